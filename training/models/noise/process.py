"""The forward process: clean latents → noisy latents and target; its sampler.

Each process returns the diffusers scheduler that reverses it, so that sampling a product needs no code of Capstan's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch

from capstan.training.draws import integers, normal
from capstan.training.models.noise import objectives
from capstan.training.models.noise.schedulers import STEPS, SamplerName, ddpm_scheduler, flow_scheduler
from capstan.training.models.noise.settings import DdpmSettings, FlowSettings


class Task(NamedTuple):
    """One step's input, noisy latents [B, C, h, w] and timesteps [B], and its `target`."""

    noisy: torch.Tensor
    timesteps: torch.Tensor  # integers, or float32 for flow with exact times
    target: torch.Tensor
    weight: torch.Tensor | None  # [B]


class Process(ABC):
    """A way to add noise in training, and the scheduler that removes it in sampling."""

    @abstractmethod
    def draw(self, latents: torch.Tensor, draw: torch.Generator) -> Task:
        """Noise `latents` [B, C, h, w] (float32, of mean 0 and variance about 1) at times drawn for each sample."""

    @abstractmethod
    def scheduler(self) -> Any:
        """Return the diffusers scheduler for sampling."""


class Flow(Process):
    """Rectified flow, sampled along the straight path; images have `size` pixels per side.

    `exact`: the pipeline's scheduler passes exact times to the model; else whole thousandths, rounded down.
    """

    def __init__(
        self, settings: FlowSettings, sampler: SamplerName | None = None, *, size: int = 0, exact: bool = False
    ):
        self.settings, self.sampler, self.exact = settings, sampler, exact
        self.shift = settings.shift
        if settings.base is not None:
            self.shift *= objectives.resolution_shift(size**2, settings.base**2)

    def draw(self, latents: torch.Tensor, draw: torch.Generator) -> Task:
        chosen, count = self.settings, len(latents)
        if chosen.times == "uniform":
            time = objectives.uniform_times(count, draw)
        else:
            time = objectives.logit_normal_times(count, draw, chosen.mean, chosen.std)
        time = objectives.shift_times(time, self.shift)
        noise = normal(latents.shape, draw)
        # The same times as the scheduler passes to the model in sampling.
        timesteps = time * STEPS if self.exact else (time * STEPS).long().clamp(max=STEPS - 1)
        noisy = objectives.interpolate(latents, noise, time)
        return Task(noisy, timesteps, objectives.flow_target(latents, noise), None)

    def scheduler(self) -> Any:
        return flow_scheduler(self.sampler, self.shift, exact=self.exact)


class Ddpm(Process):
    """Denoising diffusion, sampled by DDIM unless another sampler is named."""

    def __init__(self, settings: DdpmSettings, sampler: SamplerName | None = None) -> None:
        self.settings, self.sampler = settings, sampler
        self.alphas = objectives.cumulative_alphas(
            STEPS, settings.beta_start, settings.beta_end, zero_terminal_snr=settings.zero_terminal_snr
        )

    def draw(self, latents: torch.Tensor, draw: torch.Generator) -> Task:
        chosen, device = self.settings, latents.device
        timesteps = integers(STEPS, len(latents), draw)
        noise = normal(latents.shape, draw)
        if chosen.offset_noise:
            noise = objectives.offset_noise(noise, chosen.offset_noise, draw)
        alpha = self.alphas.to(device)[timesteps]
        noisy = objectives.diffuse(latents, noise, alpha)
        target = objectives.diffusion_target(chosen.prediction, latents, noise, alpha)
        weight = None
        if chosen.min_snr is not None:
            weight = objectives.min_snr_weight(chosen.prediction, alpha, chosen.min_snr)
        return Task(noisy, timesteps, target, weight)

    def scheduler(self) -> Any:
        return ddpm_scheduler(
            self.sampler,
            beta_start=self.settings.beta_start,
            beta_end=self.settings.beta_end,
            beta_schedule="scaled_linear",
            prediction_type=self.settings.prediction,
            rescale_betas_zero_snr=self.settings.zero_terminal_snr,
        )


def process_of(settings: Any, size: int, *, exact: bool) -> Process:
    """Return the process that `objective` of a family's settings names, for images of `size` pixels per side."""
    sampler = settings.sampling.sampler
    if settings.objective == "flow":
        return Flow(settings.flow, sampler, size=size, exact=exact)
    return Ddpm(settings.ddpm, sampler)
