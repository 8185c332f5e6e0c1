"""The forward process: clean latents → what the model is given and has to predict; and the way back.

Each process names the diffusers scheduler that undoes it, so that a product needs no code of ours to draw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Final, NamedTuple

import torch

from training import objectives
from training.diffusion.settings import DdpmSettings, DiffusionSettings, FlowSettings

STEPS: Final = 1000  # the timesteps 0 … 999 that the model is told are thousandths of the way to noise


class Task(NamedTuple):
    """What one step asks of the model: noisy latents [B, C, h, w] and timesteps [B] in, `target` out."""

    noisy: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None  # [B]


class Process(ABC):
    """How noise is mixed in while training, and the scheduler that takes it out again."""

    @abstractmethod
    def draw(self, latents: torch.Tensor, draw: torch.Generator) -> Task:
        """Noise `latents` [B, C, h, w] (float32, of mean 0 and variance about 1) at times drawn for each sample."""

    @abstractmethod
    def scheduler(self) -> Any:
        """The diffusers scheduler for sampling."""


class Flow(Process):
    """Rectified flow, sampled by DPM-Solver++ (2M) along the straight path (Lu et al. 2022)."""

    def __init__(self, settings: FlowSettings) -> None:
        self.settings = settings

    def draw(self, latents: torch.Tensor, draw: torch.Generator) -> Task:
        chosen, count = self.settings, len(latents)
        if chosen.times == "uniform":
            time = objectives.uniform_times(count, draw)
        else:
            time = objectives.logit_normal_times(count, draw, chosen.mean, chosen.std)
        time = objectives.shift_times(time, chosen.shift)
        noise = torch.randn(latents.shape, generator=draw, device=latents.device)
        # The scheduler tells the model whole timesteps, cut off; so the model learns with the same.
        timesteps = (time * STEPS).long().clamp(max=STEPS - 1)
        noisy = objectives.interpolate(latents, noise, time)
        return Task(noisy, timesteps, objectives.flow_target(latents, noise), None)

    def scheduler(self) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(
            num_train_timesteps=STEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=self.settings.shift,
            algorithm_type="dpmsolver++",
            solver_order=2,
            final_sigmas_type="zero",
            steps_offset=1,  # of no effect here; StableDiffusionPipeline warns of another value
        )


class Ddpm(Process):
    """Denoising diffusion, sampled by DDIM (Song et al. 2021)."""

    def __init__(self, settings: DdpmSettings) -> None:
        self.settings = settings
        self.alphas = objectives.cumulative_alphas(
            STEPS, settings.beta_start, settings.beta_end, zero_terminal_snr=settings.zero_terminal_snr
        )

    def draw(self, latents: torch.Tensor, draw: torch.Generator) -> Task:
        chosen, device = self.settings, latents.device
        timesteps = torch.randint(STEPS, (len(latents),), generator=draw, device=device)
        noise = torch.randn(latents.shape, generator=draw, device=device)
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
        from diffusers import DDIMScheduler

        return DDIMScheduler(
            num_train_timesteps=STEPS,
            beta_start=self.settings.beta_start,
            beta_end=self.settings.beta_end,
            beta_schedule="scaled_linear",
            prediction_type=self.settings.prediction,
            rescale_betas_zero_snr=self.settings.zero_terminal_snr,
            timestep_spacing="trailing",  # begin at the last timestep, as Lin et al. 2023 §3.3 ask
            clip_sample=False,
            steps_offset=1,
        )


def process_of(settings: DiffusionSettings) -> Process:
    """The process that `objective` names."""
    return Flow(settings.flow) if settings.objective == "flow" else Ddpm(settings.ddpm)
