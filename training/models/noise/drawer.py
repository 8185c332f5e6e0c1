"""Drawing by a diffusers pipeline, and its export

Images are what `DiffusionPipeline.from_pretrained` generates anywhere else: no sampling code of our own.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Unpack

import numpy as np
import torch

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.training.drawing.drawer import Drawer, Drawn, Options, Size
from capstan.training.models.noise.schedulers import check_steps, set_sampler
from capstan.training.models.precision import FiniteChecks, frozen_outside_autocast
from capstan.training.product import quieten, read_facts

# PixArt's pipelines would generate another size and crop to the requested one, and rewrite prompts if beautifulsoup4
# is installed. Training does neither.
_AS_TRAINED: Final = ("use_resolution_binning", "clean_caption")

_PROCESSOR: Final = "image processor"


class PipelineDrawer(Drawer):
    """A diffusers pipeline and its default sampling settings."""

    def __init__(self, product: Path, device: torch.device) -> None:
        self.pipeline, self.device = self.open(product, device), device
        facts = read_facts(product)
        sampling = {"steps": 25, "guidance": 5.0} | facts.get("sampling", {})
        self.steps, self.guidance = int(sampling["steps"]), float(sampling["guidance"])

    def open(self, product: Path, device: torch.device) -> Any:
        """Return the pipeline in the product's folder."""
        return open_pipeline(product, device)

    def settings(self, *, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        return {"steps": steps or self.steps, "guidance": self.guidance if guidance is None else guidance}

    def use_sampler(self, sampler: str) -> None:
        set_sampler(self.pipeline, sampler)

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 16, **options: Unpack[Options]
    ) -> Drawn:
        """Draw uint8 images [N, H, W, 3], one per prompt; each one's noise depends on its seed, not on its batch."""
        steps = options.get("steps")
        self.check_steps(steps)
        more: dict[str, Any] = {name: False for name in _AS_TRAINED if name in self.accepted}
        if (size := options.get("size")) is not None:
            self.check_size(size)
            more |= {"width": size[0], "height": size[1]}
        images = []
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            arguments = self.arguments(part, options.get("negative"), options.get("guidance")) | more
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch]]
            images.append(self.images(arguments, generators, steps))
        return self.drawn((np.concatenate(images) * 255).round().astype(np.uint8))

    def drawn(self, made: np.ndarray) -> Drawn:
        """Return what was drawn, given uint8 images."""
        return Drawn("image", made)

    def images(self, arguments: dict[str, Any], generators: list[torch.Generator], steps: int | None) -> np.ndarray:
        """Return one batch, float [N, H, W, 3] in 0 … 1."""
        count = self.steps if steps is None else steps
        made: np.ndarray = checked(
            self.pipeline, **arguments, num_inference_steps=count, generator=generators, output_type="np"
        )
        return made

    def check_steps(self, steps: int | None) -> None:
        """Raise RecipeError if the model cannot draw in this number of steps; None means its own."""
        check_steps(self.pipeline.scheduler, self.steps if steps is None else steps, "--steps")

    @property
    def accepted(self) -> frozenset[str]:
        """The names of the arguments that the pipeline takes."""
        return frozenset(inspect.signature(self.pipeline.__call__).parameters)

    def arguments(self, prompts: list[str], negative: str | None, guidance: float | None) -> dict[str, Any]:
        """Return the pipeline's arguments for prompts and guidance."""
        negatives = {} if negative is None else {"negative_prompt": [negative] * len(prompts)}
        return {"prompt": prompts, "guidance_scale": self.guidance if guidance is None else guidance, **negatives}

    def check_size(self, size: Size) -> None:
        """Raise RecipeError if the model cannot draw this size."""
        raise RecipeError("--size", "this model draws images of one size", "remove it")


def checked(pipeline: Any, **arguments: Any) -> Any:
    """Return the images or clips of a pipeline's call. Raises CapstanError naming the part that made the first NaN."""
    checks = FiniteChecks()
    with frozen_outside_autocast(pipeline), checks.watching(pipeline):
        result = pipeline(**arguments)
    images = result.images if "images" in result else result.frames
    bad = checks.first_bad()
    if bad is not None or not bool(torch.as_tensor(images).isfinite().all()):
        problem = f"sample: the images are not finite; the first values that are not came from the {bad or _PROCESSOR}"
        raise CapstanError(f"{problem}. Fix: use weights in fp32 or bf16, or an earlier state of the run")
    return images


def open_pipeline(product: Path, device: torch.device) -> Any:
    """Open the diffusers pipeline in a folder, in fp32 on `device`."""
    from diffusers import DiffusionPipeline

    quieten()
    pipeline = DiffusionPipeline.from_pretrained(product, torch_dtype=torch.float32, trust_remote_code=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def export_product(product: Path, folder: Path, precision: str, sampler: str | None = None) -> str:
    """Write the pipeline in `product` as `export_pipeline` does, with another sampler if one is named."""
    pipeline = open_pipeline(product, torch.device("cpu"))
    if sampler is not None:
        set_sampler(pipeline, sampler)
    return export_pipeline(pipeline, folder, precision)


def export_pipeline(pipeline: Any, folder: Path, precision: str) -> str:
    """Write a pipeline on the CPU into `folder` as safetensors in `precision`; return its class's name."""
    check_weights(pipeline, precision)
    pipeline.to(dtype=_dtype(precision))
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in sorted(folder.rglob("*.json")):
        _forget_path(path)
    return type(pipeline).__name__


def _forget_path(config: Path) -> None:
    """Remove from a configuration where its model was opened: a path of this machine."""
    content = json.loads(config.read_text(encoding="utf-8"))
    if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_weights(pipeline: Any, precision: str) -> None:
    """Raise CapstanError for weights that are not finite, RecipeError for those that `precision` cannot hold."""
    largest = torch.finfo(_dtype(precision)).max
    for name, part in pipeline.components.items():
        weights = part.state_dict() if isinstance(part, torch.nn.Module) else {}
        for key, weight in weights.items():
            if not weight.is_floating_point():
                continue
            if not weight.isfinite().all():
                raise CapstanError(f"export: {name} has weights that are not finite ({key}). Fix: use an earlier state")
            if overflowing := int((weight.abs() > largest).sum()):
                problem = (
                    f"{precision} cannot hold {overflowing} weights of {name} ({key}: up to {weight.abs().max():.3g})"
                )
                raise RecipeError("--precision", problem, "use bf16 or fp32")


def _dtype(precision: str) -> torch.dtype:
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
