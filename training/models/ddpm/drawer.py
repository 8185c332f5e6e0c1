"""Drawing with the family `ddpm`: by diffusers' DDPMPipeline, or by the pipeline with text"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import diffusers
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.drawing.drawer import refuse_options
from capstan.training.models.ddpm import pipeline as with_text
from capstan.training.models.noise.drawer import PipelineDrawer, open_pipeline
from capstan.training.models.pixels.process import other_scheduler

_SCHEDULERS: Final = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler")


class PixelDrawer(PipelineDrawer):
    """A pipeline on pixels; without a text encoder it takes no prompts."""

    def __init__(self, product: Path, device: torch.device) -> None:
        super().__init__(product, device)
        self.prompted = hasattr(self.pipeline, "text_encoder")

    def open(self, product: Path, device: torch.device) -> Any:
        return (
            open_with_text(product, device) if (product / "text_encoder").is_dir() else open_pipeline(product, device)
        )

    def settings(self, *, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        whole = super().settings(steps=steps, guidance=guidance)
        return whole if self.prompted else {"steps": whole["steps"]}

    def arguments(self, prompts: list[str], negative: str | None, guidance: float | None) -> dict[str, Any]:
        if self.prompted:
            return super().arguments(prompts, negative, guidance)
        refuse_options({"negative": negative, "guidance": guidance})
        return {"batch_size": len(prompts)}

    def use_sampler(self, sampler: str) -> None:
        """Draw by ddim, ddpm or dpm++, on the noise schedule that was trained. Raises RecipeError for others."""
        learned = self.pipeline.scheduler.config.get("variance_type") == "learned_range"
        if sampler not in ("ddim", "ddpm", "dpm++") or (learned and sampler != "ddpm"):
            known = "ddpm, which uses its learned variance" if learned else "ddim, ddpm or dpm++"
            raise RecipeError("--sampler", f"{sampler} is not for this model", f"use {known}")
        if sampler == "dpm++" and not self.prompted:
            raise RecipeError("--sampler", "diffusers' DDPMPipeline cannot use dpm++", "use ddim or ddpm")
        self.pipeline.scheduler = other_scheduler(self.pipeline, sampler)


def open_with_text(product: Path, device: torch.device) -> Any:
    """Open the pipeline with text from its parts, so that no code in the folder is run."""
    from transformers import CLIPTextModel, CLIPTokenizer

    kind = json.loads((product / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")).get("_class_name")
    if kind not in _SCHEDULERS:
        raise RecipeError("RUN", f"{product} has an unknown scheduler ({kind})", f"use {', '.join(_SCHEDULERS)}")
    made = with_text.TextToPixelsPipeline(
        unet=diffusers.UNet2DConditionModel.from_pretrained(product / "unet", torch_dtype=torch.float32),
        scheduler=getattr(diffusers, kind).from_pretrained(product / "scheduler"),
        text_encoder=CLIPTextModel.from_pretrained(product / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(product / "tokenizer"),
    )
    made.set_progress_bar_config(disable=True)
    return made.to(device)


def add_code(folder: Path) -> None:
    """Add the pipeline's own file to an exported folder, and name it where diffusers looks for it."""
    shutil.copyfile(Path(with_text.__file__), folder / "pipeline.py")
    index = folder / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["_class_name"] = ["pipeline", with_text.TextToPixelsPipeline.__name__]
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
