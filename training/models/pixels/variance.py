"""The learned variance of the reverse process, and the variational bound that teaches it (Nichol & Dhariwal 2021)

    log σ²_t = v log β_t + (1 − v) log β̃_t        v in [0, 1] by the network, for each pixel (eq. 15)
    L_t      = KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t))    and at t = 0  −log p(x_0 | x_1)       (Ho et al., eq. 5)
    loss     = mean squared error + λ · Σ_t L_t, in which the bound sees the predicted mean without gradient (eq. 16)

Shapes: images [B, C, h, w]; t [B] counts from 0, so t = 0 is the paper's t = 1.
"""

from __future__ import annotations

import math

import torch

_BIN = 1 / 255  # half of an 8-bit step in −1 … 1


class Posterior:
    """q(x_{t−1} | x_t, x_0) = N(μ̃, β̃) of a noise schedule ᾱ [T] (Ho et al. 2020, eq. 6 and 7)."""

    def __init__(self, alphas: torch.Tensor) -> None:
        alphas = alphas.double()
        before = torch.cat([alphas.new_ones(1), alphas[:-1]])
        betas = 1 - alphas / before
        variance = betas * (1 - before) / (1 - alphas)
        # β̃ is 0 at the first step; the papers' code takes the second one's there.
        self.log_least = torch.cat([variance[1:2], variance[1:]]).log().float()
        self.log_most = betas.log().float()
        self.of_clean = (betas * before.sqrt() / (1 - alphas)).float()
        self.of_noisy = ((1 - before) * (1 - betas).sqrt() / (1 - alphas)).float()

    def mean(self, clean: torch.Tensor, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Return μ̃_t(x_t, x_0)."""
        return _at(self.of_clean, times) * clean + _at(self.of_noisy, times) * noisy

    def log_variance(self, raw: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Return log σ²_t of the network's output `raw`: −1 is β̃, 1 is β."""
        share = (raw + 1) / 2
        return share * _at(self.log_most, times) + (1 - share) * _at(self.log_least, times)

    def bound(
        self, clean: torch.Tensor, noisy: torch.Tensor, times: torch.Tensor, guess: torch.Tensor, raw: torch.Tensor
    ) -> torch.Tensor:
        """Return T · L_t [B] in bits per value, which is Σ_t L_t on average over t.

        `guess` is the x_0 that the network predicts, without gradient; `raw` its output for the variance.
        """
        mean, log_variance = self.mean(guess, noisy, times), self.log_variance(raw.float(), times)
        apart = gaussian_kl(self.mean(clean, noisy, times), _at(self.log_least, times), mean, log_variance)
        first = -discretised_log_likelihood(clean, mean, 0.5 * log_variance)
        bits = torch.where((times == 0).view(-1, 1, 1, 1), first, apart).flatten(1).mean(1) / math.log(2)
        return bits * len(self.log_most)


def gaussian_kl(
    mean: torch.Tensor, log_variance: torch.Tensor, other: torch.Tensor, log_other: torch.Tensor
) -> torch.Tensor:
    """Return KL(N(mean, variance) ‖ N(other, other variance)) of each value, in nats."""
    ratio = torch.exp(log_variance - log_other)
    return 0.5 * (log_other - log_variance + ratio + (mean - other).square() * torch.exp(-log_other) - 1)


def discretised_log_likelihood(values: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Return log of the mass that N(mean, std²) has in each value's 8-bit step; the outer two steps are open.

    Ho et al. 2020, eq. 13.
    """
    scaled = torch.exp(-log_std)
    above, below = _cdf(scaled * (values - mean + _BIN)), _cdf(scaled * (values - mean - _BIN))
    above = torch.where(values > 1 - _BIN, torch.ones_like(above), above)
    below = torch.where(values < -1 + _BIN, torch.zeros_like(below), below)
    return (above - below).clamp(min=1e-12).log()


def _cdf(values: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(values / math.sqrt(2)))


def _at(values: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Return values [T] at `times` [B], as [B, 1, 1, 1]."""
    return values.to(times.device)[times].view(-1, 1, 1, 1)
