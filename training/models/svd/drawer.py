"""Drawing with the family `svd`: an image → a clip that begins with it, by diffusers' StableVideoDiffusionPipeline"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Unpack

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.drawing.drawer import Continued, Drawn, Kind, Options, refuse_options
from capstan.training.models.autoencoder.codec import reconstruct
from capstan.training.models.noise.drawer import PipelineDrawer, checked
from capstan.training.models.svd.config import ClipSampling
from capstan.training.models.svd.measures import first_frame, last_colours, moved
from capstan.training.product import read_facts

_FPS: Final = 7.0  # of models of other tools: the pipeline's default
_BUCKETS: Final = (0, 127, 255)  # in which an evaluation draws each image


class ImageToClip(PipelineDrawer):
    """A StableVideoDiffusionPipeline, and the clips that it was trained on."""

    kind: ClassVar[Kind] = "clip"
    prompted = False

    def __init__(self, product: Path, device: torch.device) -> None:
        super().__init__(product, device)
        facts, unet = read_facts(product), self.pipeline.unet.config
        self.sampling = ClipSampling(**facts.get("sampling", {}))
        self.steps, self.guidance = self.sampling.steps, self.sampling.guidance
        self.motion, self.level = self.sampling.motion, self.sampling.level
        side = int(facts.get("size", unet.sample_size * self.pipeline.vae_scale_factor))
        self.continues = Continued(int(unet.num_frames), float(facts.get("fps", _FPS)), side)

    def use_sampler(self, sampler: str) -> None:
        refuse_options({"sampler": sampler})

    def use_motion(self, bucket: int) -> None:
        self.motion = bucket

    def use_level(self, level: float) -> None:
        self.level = level

    def settings(self, *, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        chosen = super().settings(steps=steps, guidance=guidance)
        return {**chosen, "motion": self.motion, "level": self.level}

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 16, **options: Unpack[Options]
    ) -> Drawn:
        """Draw a clip for each of the option `first_frames`; its noise depends on its seed, not on its batch."""
        refuse_options({"negative": options.get("negative"), "size": options.get("size")})
        images = options.get("first_frames")
        if images is None:
            raise RecipeError("--image", "is missing: this model continues images", "add one or more image files")
        guidance = options.get("guidance")
        most = self.guidance if guidance is None else guidance
        return self._drawn(images, seeds, batch, options.get("steps") or self.steps, most, self.motion)

    def _drawn(
        self, images: np.ndarray, seeds: Sequence[int], batch: int, steps: int, guidance: float, motion: int
    ) -> Drawn:
        from PIL import Image

        assert self.continues is not None
        frames, fps, side = self.continues
        made = []
        for start in range(0, len(images), batch):
            rows = slice(start, start + batch)
            clips = checked(
                self.pipeline,
                image=[Image.fromarray(image) for image in images[rows]],
                height=side,
                width=side,
                num_frames=frames,
                num_inference_steps=steps,
                min_guidance_scale=min(self.sampling.first_guidance, guidance),
                max_guidance_scale=guidance,
                fps=fps,
                motion_bucket_id=motion,
                noise_aug_strength=self.level,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]],
                output_type="np",
            )
            made.append((clips * 255).round().astype(np.uint8))
        return Drawn("clip", np.concatenate(made), fps=fps)

    def ceiling(self, images: np.ndarray, batch: int) -> np.ndarray:
        """Return true clips, uint8 [N, frames, H, W, 3], after the autoencoder."""
        frames = reconstruct(self.pipeline.vae, images.reshape(-1, *images.shape[-3:]), batch)
        return frames.reshape(images.shape)

    def measures(
        self, images: np.ndarray, prompts: Sequence[str], batch: int, **options: Unpack[Options]
    ) -> Mapping[str, Mapping[str, float]]:
        """Continue the first frames of true clips at three motion buckets each; return how well that was done."""
        first, count = images[:, 0], len(images)
        guidance = options.get("guidance")
        chosen = options.get("steps") or self.steps, self.guidance if guidance is None else guidance
        clips = np.concatenate([self._drawn(first, range(count), batch, *chosen, one).arrays for one in _BUCKETS])
        given, asked = np.concatenate([first] * len(_BUCKETS)), [one for one in _BUCKETS for _ in range(count)]
        return {
            "first_frame": first_frame(clips, given),
            "last_colours": last_colours(clips, given),
            "moved": moved(clips, asked),
        }
