"""EDM preconditioning (Karras et al. 2022, table 1 and section 5; Blattmann et al. 2023, appendix D)

    x = x0 + σ ε, ln σ ~ N(mean, std²)         D(x; σ) = c_skip x + c_out F(c_in x; c_noise)
    c_skip = 1 / (σ² + 1)     c_out = −σ / √(σ² + 1)     c_in = 1 / √(σ² + 1)     c_noise = ¼ ln σ

for latents of deviation 1. With the weight λ = (1 + σ²) / σ² = 1 / c_out² the loss λ ‖D − x0‖² is ‖F − v‖² with
v = (ε − σ x0) / √(σ² + 1): the v-prediction of diffusers' EulerDiscreteScheduler with continuous timesteps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from capstan.training.draws import normal
from capstan.training.models.svd.config import ClipSampling, LogNormal


class Noised(NamedTuple):
    """One step's input c_in x [B, ...], c_noise [B], the target v [B, ...], and the angle of σ in 0 … 1 [B]."""

    noisy: torch.Tensor
    levels: torch.Tensor
    target: torch.Tensor
    places: torch.Tensor


def noised(latents: torch.Tensor, noise: LogNormal, draw: torch.Generator) -> Noised:
    """Noise latents [B, ...] at a level drawn for each sample."""
    sigma = log_normal(len(latents), noise, draw)
    wide = sigma.view(-1, *[1] * (latents.dim() - 1))
    epsilon = normal(latents.shape, draw)
    scale = (wide.square() + 1).rsqrt()
    noisy, target = (latents + wide * epsilon) * scale, (epsilon - wide * latents) * scale
    return Noised(noisy, 0.25 * sigma.log(), target, sigma.atan() / (math.pi / 2))


def log_normal(count: int, settings: LogNormal, draw: torch.Generator) -> torch.Tensor:
    """Draw σ [count] with ln σ ~ N(mean, std²)."""
    return (settings.mean + settings.std * normal((count,), draw)).exp()


def scheduler_of(sampling: ClipSampling) -> Any:
    """Return the diffusers scheduler that reverses `noised`, in the steps of Karras et al. 2022, eq. 5."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        use_karras_sigmas=True,
        sigma_min=sampling.sigma_min,
        sigma_max=sampling.sigma_max,
        steps_offset=1,
    )
