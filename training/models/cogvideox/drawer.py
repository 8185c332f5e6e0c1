"""Drawing clips with the family `cogvideox`, by diffusers' CogVideoXPipeline"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.drawing.drawer import Drawn, Kind, Size
from capstan.training.models.noise.drawer import PipelineDrawer
from capstan.training.models.video_autoencoder.model import reconstruct
from capstan.training.product import read_facts

_FPS: Final = 8.0  # of models of other tools: CogVideoX's own


class TextToClip(PipelineDrawer):
    """A CogVideoXPipeline, the number of frames that it was trained on, and their rate."""

    kind: ClassVar[Kind] = "clip"

    def __init__(self, product: Path, device: torch.device) -> None:
        super().__init__(product, device)
        self.config, facts = self.pipeline.transformer.config, read_facts(product)
        self.frames, self.fps = int(self.config.sample_frames), float(facts.get("fps", _FPS))

    def arguments(self, prompts: list[str], negative: str | None, guidance: float | None) -> dict[str, Any]:
        more = {"num_frames": self.frames, "max_sequence_length": int(self.config.max_text_seq_length)}
        return super().arguments(prompts, negative, guidance) | more

    def check_size(self, size: Size) -> None:
        """Raise RecipeError if a side does not divide into latents and patches, or by 8 as the pipeline requires."""
        unit = math.lcm(8, self.pipeline.vae_scale_factor_spatial * self.config.patch_size)
        if any(side <= 0 or side % unit for side in size):
            problem = f"{size[0]}x{size[1]} pixels do not divide by {unit}"
            raise RecipeError("--size", problem, f"use multiples of {unit}, e.g. {unit * 8}x{unit * 6}")

    def drawn(self, made: np.ndarray) -> Drawn:
        return Drawn("clip", made, fps=self.fps)

    def ceiling(self, images: np.ndarray, batch: int) -> np.ndarray:
        """Return true clips, uint8 [N, frames, H, W, 3], after the autoencoder."""
        return reconstruct(self.pipeline.vae, images, batch)
