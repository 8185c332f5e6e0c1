"""Small images as a stage that enlarges sees them: enlarged again, and noised (Saharia et al. 2022, §2.3)"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from capstan.training.draws import normal, uniform
from capstan.training.models.noise.objectives import cosine_betas, diffuse
from capstan.training.models.noise.schedulers import STEPS


class NoisedImages:
    """Small images, enlarged, then noised with a level of up to `most`."""

    def __init__(self, most: float) -> None:
        self.most = level_step(most)
        self.alphas = torch.cumprod(1 - cosine_betas(STEPS), dim=0)

    def draw(self, small: torch.Tensor, side: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images [B, C, side, side], noised with levels drawn for each, and the levels [B]: 0 … 999.

        `small` is [B, C, h, w] in −1 … 1. The pipeline enlarges and noises in the same way.
        """
        levels = (uniform((len(small),), draw) * (self.most + 1)).long().clamp(max=self.most)
        large = F.interpolate(small, (side, side), mode="bilinear", align_corners=True)
        return diffuse(large, normal(large.shape, draw), self.alphas.to(large.device)[levels]), levels

    @staticmethod
    def scheduler() -> Any:
        """Return the diffusers scheduler that adds the same noise."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="squaredcos_cap_v2")


def level_step(level: float) -> int:
    """Return diffusers' `noise_level`, 0 … 999, of a level from 0 to 1.

    >>> level_step(0.2)
    200
    """
    return min(STEPS - 1, round(level * STEPS))


def shrunk(images: torch.Tensor, side: int) -> torch.Tensor:
    """Return uint8 images [B, 3, h, w] averaged over areas to [B, 3, side, side]."""
    small = [
        cv2.resize(image.transpose(1, 2, 0), (side, side), interpolation=cv2.INTER_AREA) for image in images.numpy()
    ]
    return torch.from_numpy(np.array([cv2.split(image) for image in small]))
