"""The forward process in pixels, and the diffusers scheduler that reverses it"""

from __future__ import annotations

from typing import Any

import torch

from capstan.training.models.ddpm.config import DdpmSettings
from capstan.training.models.noise.objectives import cosine_betas, linear_betas, rescale_to_zero_terminal_snr
from capstan.training.models.noise.process import Ddpm
from capstan.training.models.noise.schedulers import STEPS, pixel_scheduler

_IN_DIFFUSERS = {"cosine": "squaredcos_cap_v2"}


class PixelDdpm(Ddpm):
    """Denoising diffusion of images in −1 … 1, with the schedules of the papers on pixels."""

    def __init__(self, settings: DdpmSettings) -> None:
        noise = settings.noise
        super().__init__(noise)
        self.family = settings
        if noise.schedule != "scaled_linear":
            ends = (noise.beta_start, noise.beta_end)
            betas = cosine_betas(STEPS) if noise.schedule == "cosine" else linear_betas(STEPS, *ends)
            alphas = torch.cumprod(1 - betas, dim=0)
            self.alphas = rescale_to_zero_terminal_snr(alphas) if noise.zero_terminal_snr else alphas

    def scheduler(self) -> Any:
        noise = self.family.noise
        return pixel_scheduler(
            self.family.sampler,
            variance=self.family.variance,
            beta_start=noise.beta_start,
            beta_end=noise.beta_end,
            beta_schedule=_IN_DIFFUSERS.get(noise.schedule, noise.schedule),
            prediction_type=noise.prediction,
            rescale_betas_zero_snr=noise.zero_terminal_snr,
        )
