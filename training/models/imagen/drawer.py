"""Drawing with a cascade: the base's pipeline, then each that enlarges, on one generator per image"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import cv2
import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.data.transforms import psnr, to_signed
from capstan.training.drawing.drawer import Options
from capstan.training.models.imagen.noising import level_step, shrunk
from capstan.training.models.imagen.stages import sampling_of, stages_of
from capstan.training.models.noise.drawer import PipelineDrawer, checked, open_pipeline
from capstan.training.models.noise.schedulers import check_steps
from capstan.training.models.pixels.process import other_scheduler
from capstan.training.models.precision import frozen_outside_autocast

# The pipelines' own defaults, for those of other tools.
_BASE = {"steps": 100, "guidance": 7.0}
_SUPER = {"steps": 50, "guidance": 4.0, "level": 0.25}


class CascadeDrawer(PipelineDrawer):
    """The stages of a cascade. `--steps` and `--guidance` are for all of them; else each has its own."""

    def __init__(self, product: Path, device: torch.device) -> None:
        stages, known = stages_of(product), sampling_of(product)
        self.pipelines = [open_pipeline(stage, device) for stage in stages]
        defaults = [_BASE, *[_SUPER] * (len(stages) - 1)]
        self.sampling = [known[number] if number < len(known) else defaults[number] for number in range(len(stages))]
        super().__init__(product, device)

    def open(self, product: Path, device: torch.device) -> Any:
        return self.pipelines[-1]

    def settings(self, *, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        given = {name: value for name, value in (("steps", steps), ("guidance", guidance)) if value is not None}
        every = [stage | given for stage in self.sampling]
        return every[0] if len(every) == 1 else {"stages": every}

    def use_sampler(self, sampler: str) -> None:
        """Draw every stage by ddpm or dpm++. Raises RecipeError for others."""
        learned = any(one.scheduler.config.get("variance_type") == "learned_range" for one in self.pipelines)
        if sampler not in ("ddpm", "dpm++") or (learned and sampler != "ddpm"):
            known = "ddpm, which uses its learned variance" if learned else "ddpm or dpm++"
            raise RecipeError("--sampler", f"{sampler} is not for this model", f"use {known}")
        for pipeline in self.pipelines:
            pipeline.scheduler = other_scheduler(pipeline, sampler)

    def use_level(self, level: float) -> None:
        if len(self.pipelines) == 1:
            super().use_level(level)
        self.sampling[1:] = [stage | {"level": level} for stage in self.sampling[1:]]

    def arguments(self, prompts: list[str], negative: str | None, guidance: float | None) -> dict[str, Any]:
        return {"prompts": prompts, "negative": negative, "guidance": guidance}

    def images(self, arguments: dict[str, Any], generators: list[torch.Generator], steps: int | None) -> np.ndarray:
        """Draw by every stage in turn. Between them an image is not rounded to 8 bits."""
        texts = self._states(arguments["prompts"], arguments["negative"])
        image: Any = None
        for number in range(len(self.pipelines)):
            image = self._stage(number, texts, image, generators, steps, arguments["guidance"])
        return np.asarray(image)

    def _states(self, prompts: list[str], negative: str | None) -> dict[str, torch.Tensor]:
        """Return the T5's states of the prompts and of what is negative, by the pipelines' names for them."""
        refused = None if negative is None else [negative] * len(prompts)
        base = self.pipelines[0]
        with torch.no_grad(), frozen_outside_autocast(base), _without_warnings():
            states = base.encode_prompt(prompts, negative_prompt=refused, device=self.device, clean_caption=False)
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), states, strict=True))

    def _stage(
        self,
        number: int,
        texts: Mapping[str, torch.Tensor],
        image: torch.Tensor | None,
        generators: list[torch.Generator],
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Any:
        """Return one stage's images: float [N, H, W, 3] in 0 … 1 of the last, else [N, 3, H, W] in −1 … 1."""
        sampling = self.sampling[number]
        more = {} if image is None else {"image": image, "noise_level": level_step(sampling["level"])}
        return checked(
            self.pipelines[number],
            **texts,
            **more,
            num_inference_steps=sampling["steps"] if steps is None else steps,
            guidance_scale=sampling["guidance"] if guidance is None else guidance,
            generator=generators,
            output_type="np" if number == len(self.pipelines) - 1 else "pt",
        )

    def check_steps(self, steps: int | None) -> None:
        for pipeline, sampling in zip(self.pipelines, self.sampling, strict=True):
            check_steps(pipeline.scheduler, int(sampling["steps"]) if steps is None else steps, "--steps")

    def measures(
        self, images: np.ndarray, prompts: Sequence[str], batch: int, **options: Unpack[Options]
    ) -> Mapping[str, Mapping[str, float]]:
        """Return the PSNR in dB of true images that are made small and enlarged by the last stage.

        Its chance level is that of bicubic enlargement.
        """
        if len(self.pipelines) == 1:
            return {}
        true = torch.from_numpy(images).permute(0, 3, 1, 2)
        small = shrunk(true, int(self.pipelines[-2].unet.config.sample_size))
        made = []
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            generators = [torch.Generator("cpu").manual_seed(start + n) for n in range(len(prompts[part]))]
            given = to_signed(small[part]).to(self.device)
            states = self._states(list(prompts[part]), None)
            stage = len(self.pipelines) - 1
            chosen = options.get("steps"), options.get("guidance")
            made.append(self._stage(stage, states, given, generators, *chosen))
        side = images.shape[1]
        cubic = [
            cv2.resize(one, (side, side), interpolation=cv2.INTER_CUBIC) for one in small.permute(0, 2, 3, 1).numpy()
        ]
        drawn = torch.from_numpy(np.concatenate(made)).permute(0, 3, 1, 2) * 2 - 1
        enlarged = to_signed(torch.from_numpy(np.stack(cubic)).permute(0, 3, 1, 2))
        truth = to_signed(true)
        return {"psnr": {"value": float(psnr(drawn, truth).mean()), "chance": float(psnr(enlarged, truth).mean())}}


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence what diffusers says of each long prompt: training has said it once, and how much is cut."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
