"""AutoencoderKL as one trainable module, its loss terms, and the latents' scale.

Shapes: images [B, 3, H, W] in −1 … 1; latents [B, C, H/f, W/f] with f = 2^(levels − 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Reconstruction(NamedTuple):
    """A batch's reconstructed images and the posterior N(mean, exp(log_variance)) of its latents."""

    images: torch.Tensor
    mean: torch.Tensor
    log_variance: torch.Tensor


class Autoencoder(nn.Module):
    """AutoencoderKL whose forward returns everything that the loss needs."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        """Encode, sample the latent mean + std · `noise` (Kingma & Welling 2014, eq. 10), decode."""
        posterior = self.vae.encode(images).latent_dist
        latent = posterior.mean + posterior.std * noise.to(posterior.mean)
        return Reconstruction(self.vae.decode(latent).sample, posterior.mean, posterior.logvar)


def lower_log_variance(vae: AutoencoderKL, value: float) -> None:
    """Set every latent's initial variance to exp(`value`), so that training starts as with a plain autoencoder.

    With the usual start near variance 1 the decoder's input has noise as strong as the signal.
    """
    conv, channels = vae.quant_conv, vae.config.latent_channels
    if conv is None:
        return
    with torch.no_grad():
        conv.weight[channels:].zero_()
        conv.bias[channels:].fill_(value)


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, exp(log_variance)) ‖ N(0, 1)) in nats, summed per sample [B] (Kingma & Welling 2014)."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def edge_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of horizontal and vertical gradients, which weights outlines over areas.

    Mathieu et al. 2016, “Deep multi-scale video prediction beyond mean square error”, eq. 6 with α = 1.
    """
    difference = a.float() - b.float()
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def latent_moments(vae: AutoencoderKL, images: torch.Tensor, batch: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation [C] of the latents of `images`, including the posterior's variance."""
    means, squares = [], []
    for part in images.split(batch):
        with torch.no_grad():
            posterior = vae.encode(part).latent_dist
        means.append(posterior.mean.double())
        squares.append(posterior.mean.double().square() + posterior.var.double())
    axes = (0, 2, 3)
    mean, square = torch.cat(means).mean(axes), torch.cat(squares).mean(axes)
    return mean.float(), (square - mean.square()).clamp(min=1e-12).sqrt().float()


def standardise(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Change the latents of `images` to mean 0 and variance 1; return their mean and deviation [C] from before.

    Each channel's shift and scale are folded into the 1×1 convolutions on both sides of the latent. So encoding
    followed by decoding is unchanged, and `scaling_factor` becomes 1: diffusers' StableDiffusionPipeline has one factor
    for all channels, and no shift. A model without these convolutions gets only the factor.
    """
    mean, std = latent_moments(vae, images)
    if vae.quant_conv is None or vae.post_quant_conv is None:
        vae.register_to_config(scaling_factor=float(1 / std.square().mean().sqrt()))
        return mean, std
    before, after, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    with torch.no_grad():
        # mean' = (mean − m) / s and log σ'² = log σ² − 2 log s …
        before.weight[:channels] /= std[:, None, None, None]
        before.bias[:channels] = (before.bias[:channels] - mean) / std
        before.bias[channels:] -= 2 * std.log()
        # … and z = s z' + m.
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)
    return mean, std
