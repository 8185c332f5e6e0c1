"""The forward process in pixels, and the diffusers scheduler that reverses it"""

from __future__ import annotations

from typing import Any

import torch

from capstan.training.models.noise.objectives import cosine_betas, linear_betas, rescale_to_zero_terminal_snr
from capstan.training.models.noise.process import Ddpm
from capstan.training.models.noise.schedulers import STEPS, pixel_scheduler
from capstan.training.models.pixels.settings import PixelNoise, Variance

_IN_DIFFUSERS = {"cosine": "squaredcos_cap_v2"}


class PixelDdpm(Ddpm):
    """Denoising diffusion of images in −1 … 1, with the schedules of the papers on pixels.

    `sampler`, `variance` and `threshold` are those of `pixel_scheduler`.
    """

    def __init__(self, noise: PixelNoise, *, sampler: str, variance: Variance, threshold: float | None = None) -> None:
        super().__init__(noise)
        self.noise = noise
        self.sampling: dict[str, Any] = {"sampler": sampler, "variance": variance, "threshold": threshold}
        if noise.schedule != "scaled_linear":
            ends = (noise.beta_start, noise.beta_end)
            betas = cosine_betas(STEPS) if noise.schedule == "cosine" else linear_betas(STEPS, *ends)
            alphas = torch.cumprod(1 - betas, dim=0)
            self.alphas = rescale_to_zero_terminal_snr(alphas) if noise.zero_terminal_snr else alphas

    def scheduler(self) -> Any:
        noise = self.noise
        return pixel_scheduler(
            **self.sampling,
            beta_start=noise.beta_start,
            beta_end=noise.beta_end,
            beta_schedule=_IN_DIFFUSERS.get(noise.schedule, noise.schedule),
            prediction_type=noise.prediction,
            rescale_betas_zero_snr=noise.zero_terminal_snr,
        )


def other_scheduler(pipeline: Any, sampler: str) -> Any:
    """Return another scheduler on the noise schedule that a pipeline's network was trained on."""
    config = pipeline.scheduler.config
    learned = config.get("variance_type") == "learned_range"
    names = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr")
    schedule = {name: config[name] for name in names if name in config}
    variance = "learned" if learned else config.get("variance_type") or "fixed_large"
    dynamic = config.get("thresholding") and config["sample_max_value"] > 1
    threshold = config["dynamic_thresholding_ratio"] if dynamic else None
    return pixel_scheduler(sampler, variance=variance, threshold=threshold, **schedule)
