"""Diffusion objectives: latents, noise and time → noisy latents, target, weight.

Pure functions, each with its paper and equation. Two kinds of paths from data x0 to noise ε ~ N(0, I):

    DDPM             x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε     t = 0 … T−1, ᾱ falling from about 1 to about 0
    rectified flow   x_t = (1−t) x0 + t ε           t in [0, 1]

Shapes: x0, ε, x_t and predictions are [B, ...]; t and ᾱ are [B] (or [T] for a whole schedule), float32.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from capstan.training.draws import normal, uniform

Prediction = Literal["epsilon", "sample", "v_prediction"]  # diffusers' names for ε, x0 and v


# DDPM ----------------------------------------------------------------------------------------------------------------


def cumulative_alphas(
    steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, *, zero_terminal_snr: bool = False
) -> torch.Tensor:
    """Return ᾱ [T] of the “scaled linear” schedule: √β rises linearly (Rombach et al. 2022, latent diffusion, §4).

    ᾱ_t = Π_{s≤t} (1 − β_s) (Ho et al. 2020, DDPM, eq. 4). The same numbers as diffusers' schedulers.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
    alphas = torch.cumprod(1.0 - betas, dim=0)
    return rescale_to_zero_terminal_snr(alphas) if zero_terminal_snr else alphas


def linear_betas(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> torch.Tensor:
    """Return β [T], rising linearly (Ho et al. 2020, DDPM, §4)."""
    return torch.linspace(start, end, steps, dtype=torch.float32)


def cosine_betas(steps: int = 1000, most: float = 0.999) -> torch.Tensor:
    """Return β [T] of ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + 0.008)/1.008 · π/2), β at most 0.999.

    Nichol & Dhariwal 2021, Improved DDPM, eq. 17. The same numbers as diffusers' squaredcos_cap_v2.
    """
    at = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008
    level = torch.cos(at * math.pi / 2) ** 2
    return (1 - level[1:] / level[:-1]).clamp(max=most).float()


def rescale_to_zero_terminal_snr(alphas: torch.Tensor) -> torch.Tensor:
    """Shift and scale ᾱ [T] so that ᾱ_T = 0 and ᾱ_0 is kept.

    Lin et al. 2023, “Common diffusion noise schedules and sample steps are flawed”, alg. 1.
    """
    root = alphas.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2


def diffuse(x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Return x_t = √ᾱ x0 + √(1−ᾱ) ε (Ho et al. 2020, eq. 4); `alpha` is ᾱ [B]."""
    alpha = _expand_to(alpha, x0)
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise


def diffusion_target(kind: Prediction, x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Return ε (Ho et al. 2020, eq. 14), x0, or v = √ᾱ ε − √(1−ᾱ) x0 (Salimans & Ho 2022, §4)."""
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x0
    alpha = _expand_to(alpha, x0)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * x0


def predicted_x0(kind: Prediction, prediction: torch.Tensor, noisy: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Return the x0 that a prediction implies; v: √ᾱ x_t − √(1−ᾱ) v (Salimans & Ho 2022, §4). ε needs ᾱ > 0."""
    alpha = _expand_to(alpha, noisy)
    if kind == "epsilon":
        return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
    if kind == "sample":
        return prediction
    return alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction


def min_snr_weight(kind: Prediction, alpha: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """Return the loss weight [B] that clamps SNR = ᾱ/(1−ᾱ) at γ (Hang et al. 2023, Min-SNR, §3.4).

    min(SNR, γ) for x0, divided by SNR for ε and by SNR + 1 for v; written without SNR so that ᾱ = 0 and 1 are finite.
    """
    clamped = torch.minimum(alpha, gamma * (1 - alpha))  # min(SNR, γ)·(1−ᾱ)
    if kind == "epsilon":
        return torch.where(alpha > 0, clamped / alpha.clamp(min=1e-12), torch.ones_like(alpha))
    if kind == "v_prediction":
        return clamped  # SNR + 1 = 1/(1−ᾱ)
    return torch.minimum(alpha / (1 - alpha).clamp(min=1e-12), torch.full_like(alpha, gamma))


def offset_noise(noise: torch.Tensor, strength: float, draw: torch.Generator) -> torch.Tensor:
    """Add to noise [B, C, ...] a shared value per sample and channel, so that brightness is learnt too.

    ε + strength · N(0, 1) of shape [B, C, 1, ...] (Guttenberg 2023, “Diffusion with offset noise”).
    """
    shape = (*noise.shape[:2], *[1] * (noise.dim() - 2))
    return noise + strength * normal(shape, draw, noise.dtype)


# Rectified flow ------------------------------------------------------------------------------------------------------


def interpolate(x0: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Return x_t = (1−t) x0 + t ε, the straight path (Liu et al. 2022, rectified flow, eq. 1, from data to noise)."""
    time = _expand_to(time, x0)
    return (1 - time) * x0 + time * noise


def flow_target(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return dx_t/dt = ε − x0, the velocity along the straight path (Liu et al. 2022, eq. 1)."""
    return noise - x0


def uniform_times(count: int, draw: torch.Generator) -> torch.Tensor:
    """Draw t [count] ~ U(0, 1)."""
    return uniform((count,), draw)


def logit_normal_times(count: int, draw: torch.Generator, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    """Draw t [count] = sigmoid(N(mean, std²)), most often the middle of the path (Esser et al. 2024, SD3, eq. 19)."""
    return torch.sigmoid(mean + std * normal((count,), draw))


def shift_times(time: torch.Tensor, shift: float) -> torch.Tensor:
    """Return t' = s t / (1 + (s−1) t): more noise, for larger images (Esser et al. 2024, eq. 23 with s = √(m/n))."""
    return shift * time / (1 + (shift - 1) * time)


def resolution_shift(values: float, base: float) -> float:
    """Return s = √(m/n), the shift that makes images of m values as noisy as those of n (Esser et al. 2024, eq. 23).

    An image of m values averages out its noise √(m/n) times better than one of n; `values` and `base` are m and n.

    >>> resolution_shift(1024**2, 256**2)
    4.0
    """
    return (values / base) ** 0.5


# Both ----------------------------------------------------------------------------------------------------------------


def sample_mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return each sample's mean squared error [B], computed in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def weighted_mse(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean over the batch of weight [B] × each sample's mean squared error, computed in float32."""
    error = sample_mse(prediction, target)
    return (error if weight is None else error * weight).mean()


def drop_rows(count: int, probability: float, draw: torch.Generator) -> torch.Tensor:
    """Draw a mask [count] of samples without caption, for classifier-free guidance (Ho & Salimans 2022, alg. 1)."""
    return uniform((count,), draw) < probability


def drop_encoders(count: int, encoders: int, probability: float, draw: torch.Generator) -> torch.Tensor:
    """Draw a mask [count, encoders] of the text encoders that a sample does not see, each independently.

    All are dropped with probability p^encoders: 0.463 leaves a tenth of SD3's samples without text (Esser et al. 2024).
    """
    return uniform((count, encoders), draw) < probability


def _expand_to(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape [B] to [B, 1, ...] with the dimensions of `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
