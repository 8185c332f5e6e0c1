"""AutoencoderOobleck as one trainable module, its first weights, its loss terms, and the latents' scale.

Shapes: sounds [B, channels, values] in −1 … 1; latents [B, C, values / hop].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.nn.utils.weight_norm import WeightNorm

_GAIN: Final = math.sqrt(3.0)  # torch's first weights shrink a signal by this much in every layer
_BRANCH: Final = 0.1  # share of a residual unit's branch at the start
_START_STD: Final = -4.0  # softplus of it is the latents' deviation at the start
_FLOOR: Final = 1e-3  # of magnitudes, so that silence has a logarithm


class Reconstruction(NamedTuple):
    """A batch's reconstructed sounds and the posterior N(mean, std²) of its latents."""

    sounds: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


class Oobleck(nn.Module):
    """AutoencoderOobleck whose forward returns everything that the loss needs."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sounds: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        """Encode, sample the latent mean + std · `noise` (Kingma & Welling 2014, eq. 10), decode."""
        posterior = self.vae.encode(sounds).latent_dist
        latent = posterior.mean + posterior.std * noise.to(posterior.mean)
        return Reconstruction(self.vae.decode(latent).sample, posterior.mean, posterior.std)


def build(shape: dict[str, Any], *, channels: int, rate: int) -> Any:
    """Return a new AutoencoderOobleck whose first weights let a signal through.

    With torch's own, a sound would leave the encoder a hundred times weaker, and its latents would be noise: nothing is
    learnt in hundreds of steps. Here levels keep the strength of their input, residual units start near the identity,
    and the latents' deviation starts near 0.02.
    """
    from diffusers import AutoencoderOobleck

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the weight_norm that diffusers uses
        vae = AutoencoderOobleck(**shape, audio_channels=channels, sampling_rate=rate)
    latent = int(vae.config.decoder_input_channels)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not hasattr(module, "weight_g"):
                continue
            if "res_unit" not in name:
                module.weight_g.mul_(_GAIN)
            elif name.endswith("conv2"):
                module.weight_g.mul_(_BRANCH)
        vae.encoder.conv2.weight_g[latent:].mul_(1e-3)
        vae.encoder.conv2.bias[latent:].fill_(_START_STD)
    settle(vae)
    return vae


def settle(vae: nn.Module) -> None:
    """Compute all normalised weights without a gradient: only then can a module be copied."""
    for module in vae.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                with torch.no_grad():
                    setattr(module, hook.name, hook.compute_weight(module))


def spectral_difference(a: torch.Tensor, b: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the multi-resolution STFT loss of sounds [B, channels, values]: mean over `sizes`, scalar.

    Spectral convergence ‖A − B‖ / ‖B‖ and the mean absolute difference of log magnitudes (Yamamoto et al. 2020,
    Parallel WaveGAN, eq. 4–6). Windows longer than the sounds are left out.
    """
    terms = []
    a, b = (sound.float().flatten(0, 1) for sound in (a, b))
    for size in [size for size in sizes if size <= a.shape[-1]] or [min(sizes)]:
        made, true = (_magnitudes(sound, size) for sound in (a, b))
        ratio = (made - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1).clamp(min=1.0)
        terms.append(ratio.mean() + (torch.log(made + _FLOOR) - torch.log(true + _FLOOR)).abs().mean())
    return torch.stack(terms).mean()


def _magnitudes(sound: torch.Tensor, size: int) -> torch.Tensor:
    window = torch.hann_window(size, device=sound.device)
    return torch.stft(sound, size, size // 4, size, window, return_complex=True).abs()


def kl_divergence(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, std²) ‖ N(0, 1)) in nats, the mean over all values of the latents."""
    mean, variance = mean.float(), std.float().square()
    return 0.5 * (mean.square() + variance - 1 - variance.log()).mean()


def signal_to_noise(made: torch.Tensor, sounds: torch.Tensor) -> torch.Tensor:
    """Return 10 log10(Σ x² / Σ (x − y)²) of a batch, in dB."""
    signal, noise = sounds.float().square().sum(), (sounds.float() - made.float()).square().sum()
    return 10 * torch.log10(signal.clamp(min=1e-10) / noise.clamp(min=1e-10))


def latents_of(vae: Any, sounds: torch.Tensor, batch: int = 16) -> Iterator[torch.Tensor]:
    """Yield the posterior's mean of sounds [N, channels, values] by batch, on the model's device."""
    for part in sounds.split(batch):
        with torch.no_grad():
            yield vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mean


def reconstruct(vae: Any, sounds: torch.Tensor, batch: int) -> torch.Tensor:
    """Encode and decode sounds [N, channels, values]; return float32 in −1 … 1 on the CPU."""
    made = []
    for latents in latents_of(vae, sounds, batch):
        with torch.no_grad():
            made.append(vae.decode(latents).sample.float().cpu().clamp(-1, 1))
    return torch.cat(made)


def standardise(vae: Any, sounds: torch.Tensor) -> torch.Tensor:
    """Change the latents of `sounds` to a mean square of 1 in each channel; return their root mean squares before.

    The scale is folded into the convolutions on both sides of the latent, so that encoding followed by decoding is
    unchanged: StableAudioPipeline has no factor for latents. Their mean is left: the convolutions pad with zeros.
    """
    squares = torch.cat([latents.double().square().mean((0, 2))[None] for latents in latents_of(vae, sounds)])
    scale = squares.mean(0).clamp(min=1e-12).sqrt().float()
    before, after, channels = vae.encoder.conv2, vae.decoder.conv1, len(scale)
    with torch.no_grad():
        before.weight_g[:channels] /= scale[:, None, None]
        before.bias[:channels] /= scale
        before.bias[channels:] -= scale.log()  # softplus is nearly an exponential where deviations are small
        weight = after.weight_g * after.weight_v / after.weight_v.flatten(1).norm(dim=1)[:, None, None]
        weight = weight * scale[None, :, None]
        after.weight_v.copy_(weight)
        after.weight_g.copy_(weight.flatten(1).norm(dim=1)[:, None, None])
    settle(vae)
    return scale
