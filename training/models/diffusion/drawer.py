"""Drawing by the pipelines of the family `diffusion`: prompts in chunks, sizes, the autoencoder's ceiling"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.drawing.drawer import Size
from capstan.training.models.autoencoder.codec import reconstruct
from capstan.training.models.diffusion.unet import chunked_encoders
from capstan.training.models.noise.drawer import PipelineDrawer
from capstan.training.product import read_facts


class LatentDrawer(PipelineDrawer):
    """A text-to-image pipeline with an autoencoder; its text encoders may read prompts in `chunks`."""

    def __init__(self, product: Path, device: torch.device) -> None:
        super().__init__(product, device)
        self.chunks = int(read_facts(product).get("text_chunks", 1))

    def ceiling(self, images: np.ndarray, batch: int) -> np.ndarray:
        return reconstruct(self.pipeline.vae, images, batch)

    def arguments(self, prompts: list[str], negative: str | None, guidance: float | None) -> dict[str, Any]:
        """Return prompts as texts, or as their states if they are read in chunks."""
        if self.chunks == 1:
            return super().arguments(prompts, negative, guidance)
        encoders = chunked_encoders(self.pipeline, self.chunks)
        options: dict[str, Any] = {"guidance_scale": self.guidance if guidance is None else guidance}
        for sign, texts in (("", prompts), ("negative_", [negative or ""] * len(prompts))):
            states = encoders(texts)
            slots = [one.slot for one in encoders.encoders]
            options[f"{sign}prompt_embeds"] = torch.cat([states[slot.states] for slot in slots], dim=-1)
            for slot in slots:
                if slot.projected:
                    options[f"{sign}pooled_prompt_embeds"] = states[slot.pooled]
        return options

    def check_size(self, size: Size) -> None:
        """Raise RecipeError if a side does not divide into latents and patches, or by 8 as the pipelines require."""
        network = getattr(self.pipeline, "transformer", None)
        unit = math.lcm(8, self.pipeline.vae_scale_factor * (network.config.patch_size if network else 1))
        if any(side <= 0 or side % unit for side in size):
            problem = f"{size[0]}x{size[1]} pixels do not divide by {unit}"
            raise RecipeError("--size", problem, f"use multiples of {unit}, e.g. {unit * 8}x{unit * 6}")
