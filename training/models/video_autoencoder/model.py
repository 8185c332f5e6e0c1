"""AutoencoderKLCogVideoX as one trainable module, and its latents' scale

Convolutions over time see no later frame, and the first frame is a latent of its own: so an image is a clip of one
frame, with the latent that it has as the first frame of a clip (Yang et al. 2024, section 2.1).

Shapes: clips [B, 3, F, H, W] in −1 … 1; latents [B, C, 1 + (F − 1) / r, H/f, W/f].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn


class Reconstruction(NamedTuple):
    """A batch's reconstructed clips and the posterior N(mean, exp(log_variance)) of their latents; zeros follow."""

    clips: torch.Tensor
    mean: torch.Tensor
    log_variance: torch.Tensor


class VideoAutoencoder(nn.Module):
    """AutoencoderKLCogVideoX whose forward returns everything that the loss needs."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, clips: torch.Tensor, counts: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        """Encode, sample the latent mean + std · `noise` (Kingma & Welling 2014, eq. 10), decode.

        Of each clip only the first `counts` frames [B] are seen; those of one length are encoded together.
        """
        made, mean, log_variance = torch.zeros_like(clips), torch.zeros_like(noise), torch.zeros_like(noise)
        ratio = self.vae.config.temporal_compression_ratio
        for frames, rows in by_length(counts):
            posterior = self.vae.encode(clips[rows, :, :frames]).latent_dist
            length = latent_frames(frames, ratio)
            latent = posterior.mean + posterior.std * noise[rows, :, :length].to(posterior.mean)
            made[rows, :, :frames] = self.vae.decode(latent).sample.to(made.dtype)
            mean[rows, :, :length] = posterior.mean.to(mean.dtype)
            log_variance[rows, :, :length] = posterior.logvar.to(mean.dtype)
        return Reconstruction(made, mean, log_variance)


def by_length(counts: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each number of frames in `counts` [B], and which samples have it (bool [B])."""
    for frames in counts.unique().tolist():
        yield int(frames), counts == frames


def latent_frames(frames: int, ratio: int) -> int:
    """Return the number of latents along time for this number of frames."""
    return (frames - 1) // ratio + 1


def build(shape: dict[str, Any], size: int, log_variance: float) -> Any:
    """Return a new AutoencoderKLCogVideoX whose latents start with this log-variance: as a plain autoencoder."""
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX(**shape, sample_height=size, sample_width=size, scaling_factor=1.0)
    last, channels = vae.encoder.conv_out.conv, vae.config.latent_channels
    with torch.no_grad():
        last.weight[channels:].zero_()
        last.bias[channels:].fill_(log_variance)
    return vae


def standardise(vae: Any, clips: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """Change the latents of `clips` to a mean square of 1 in each channel; return their root mean squares before [C].

    The scale is folded into the convolutions that make and read latents, so that encoding followed by decoding is
    unchanged: the pipeline has one factor for all channels. Their mean is left, since convolutions pad with zeros.
    """
    squares = []
    for part in clips.split(batch):
        with torch.no_grad():
            posterior = vae.encode(part).latent_dist
        squares.append((posterior.mean.double().square() + posterior.var.double()).mean((2, 3, 4)))
    scale = torch.cat(squares).mean(0).clamp(min=1e-12).sqrt().float()
    before, channels = vae.encoder.conv_out.conv, len(scale)
    readers = [vae.decoder.conv_in.conv, *(getattr(m, n).conv for m in vae.modules() for n in ("conv_y", "conv_b")
                                           if hasattr(m, n))]  # fmt: skip
    with torch.no_grad():
        before.weight[:channels] /= scale[:, None, None, None, None]
        before.bias[:channels] /= scale
        before.bias[channels:] -= 2 * scale.log()
        for reader in readers:
            reader.weight *= scale[None, :, None, None, None]
    vae.register_to_config(scaling_factor=1.0)
    return scale


def reconstruct(vae: Any, clips: np.ndarray, batch: int) -> np.ndarray:
    """Encode and decode uint8 clips [N, F, H, W, 3] by the posterior's mean; return them in the same form."""
    made = []
    for part in torch.from_numpy(clips).permute(0, 4, 1, 2, 3).split(batch):
        with torch.no_grad():
            latents = vae.encode(part.to(vae.device, vae.dtype) / 127.5 - 1).latent_dist.mean
            decoded = vae.decode(latents).sample.float().cpu().clamp(-1, 1)
        made.append(((decoded + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(made).permute(0, 2, 3, 4, 1).numpy()
