"""The discrete VAE: VQModel with Gumbel-softmax in place of the nearest code, and the logit-Laplace likelihood.

Shapes: images [B, 3, H, W] in −1 … 1; latents z [B, D, h, w]; codes e [N, D]; logits [B, h, w, N].

    logits    l_k = −‖z − e_k‖²          the most likely code is the nearest: what is trained so is a VQModel
    code      Σ_k y_k e_k                y = softmax((l + g) / τ), g ~ Gumbel(0, 1)    (Jang et al. 2017, eq. 2)
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from capstan.training.models.vqgan.model import Vqgan, revival_loss

EPSILON: Final = 0.1  # share of the range that the logit is kept away from 0 and 1 (Ramesh et al. 2021, app. A.3)
# Of two pixel values next to each other, logits of φ differ by this at least: a narrower density only fits rounding.
_NARROWEST: Final = math.log((1 - 2 * EPSILON) * 4 / 255)


class Relaxed(NamedTuple):
    """A batch's images as the decoder draws them, and where its latents lie."""

    images: torch.Tensor
    spread: torch.Tensor  # ln b of each pixel value, [B, 3, H, W]
    latents: torch.Tensor
    logits: torch.Tensor
    abandoned: torch.Tensor  # scalar: distance of unused codes from the latents


class Dvae(Vqgan):
    """VQModel with three more outputs, ln b, which are used in training alone."""

    def __init__(self, vq: Any) -> None:
        super().__init__(vq)
        channels = vq.config.out_channels
        if vq.decoder.conv_out.out_channels == channels:
            vq.decoder.conv_out = _with_outputs(vq.decoder.conv_out, 2 * channels)

    def forward(self, images: torch.Tensor, noise: torch.Tensor, temperature: float) -> Relaxed:  # type: ignore[override]
        """Encode, draw relaxed codes by the Gumbel `noise` [B, h, w, N], decode."""
        latents = self.vq.encode(images).latents
        with torch.autocast(latents.device.type, enabled=False):
            logits = -squared_distances(latents, self.table)
            shares = ((logits + noise) / temperature).softmax(-1)
            codes = (shares @ self.table.float()).movedim(-1, 1)
        made, spread = self.decode(codes.to(latents.dtype)).chunk(2, dim=1)
        indices, closest = logits.argmax(-1), logits.flatten(0, 2).argmax(0)
        abandoned = revival_loss(latents, self.table, indices, closest)
        return Relaxed(made, spread, latents, logits, abandoned)

    def plain(self) -> Any:
        """Return the VQModel without the outputs for ln b, which shares the other weights."""
        from diffusers import VQModel

        weights = self.vq.state_dict()
        for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
            weights[name] = weights[name][: self.vq.config.out_channels]
        plain = VQModel.from_config(self.vq.config)
        plain.load_state_dict(weights)
        return plain.eval()


def squared_distances(latents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return ‖z − e‖² of all latents [B, D, h, w] and codes [N, D]: [B, h, w, N], with gradients to both."""
    flat, codes = latents.movedim(1, -1).float(), codes.float()
    return flat.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * flat @ codes.T


def farthest(points: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` of the points [N, D], each the farthest from those before it, and their mean squared distance.

    Gonzalez 1985, “Clustering to minimize the maximum intercluster distance”. Points repeat if there are too few.
    """
    nearest = (points - points.mean(0)).square().sum(1)
    chosen, distances = [], []
    for _ in range(count):
        farthest_one = int(nearest.argmax())
        chosen.append(farthest_one)
        distances.append(nearest[farthest_one])
        to_it = (points - points[farthest_one]).square().sum(1)
        nearest = torch.minimum(nearest, to_it) if len(chosen) > 1 else to_it
    return points[chosen], torch.stack(distances[1:]).mean()


def gumbel(uniform: torch.Tensor) -> torch.Tensor:
    """Return Gumbel(0, 1) noise from uniform noise in [0, 1)."""
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-(uniform.clamp(min=tiny).log())).clamp(min=tiny).log()


def kl_from_uniform(logits: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(logits) ‖ uniform) in nats, summed over latents: [B, h, w, N] → [B]."""
    logs = logits.log_softmax(-1)
    return ((logs.exp() * logs).sum(-1) + math.log(logits.shape[-1])).flatten(1).sum(1)


def logit_laplace(made: torch.Tensor, spread: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of a pixel value in nats (Ramesh et al. 2021, eq. 2).

        −ln f(x) = |logit φ(x) − μ| / b + ln 2b + ln φ(x) (1 − φ(x))          φ(x) = (1 − 2ε) x + ε, x in 0 … 1

    `made` is not μ but the image whose logit μ is, as all decoders here have it: μ = logit φ(made), continued along its
    tangent beyond black and white.
    """
    true = _squeezed(images)
    error = (true.logit() - _logit(_squeezed(made))).abs()
    log_b = spread.float().clamp(min=_NARROWEST)
    return (error * (-log_b).exp() + log_b + math.log(2) + (true * (1 - true)).log()).mean()


def scheduled(start: float, end: float, steps: int, step: int) -> float:
    """Return the value at `step` of a cosine from `start` to `end` in `steps` steps."""
    done = min(step / steps, 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def _squeezed(images: torch.Tensor) -> torch.Tensor:
    return (1 - 2 * EPSILON) * (images.float() + 1) / 2 + EPSILON


def _logit(values: torch.Tensor) -> torch.Tensor:
    inside = values.clamp(EPSILON, 1 - EPSILON)
    return inside.logit() + (values - inside) / (EPSILON * (1 - EPSILON))


def _with_outputs(conv: nn.Conv2d, outputs: int) -> nn.Conv2d:
    """Return the convolution with more outputs, which are 0."""
    wider = nn.Conv2d(conv.in_channels, outputs, conv.kernel_size, padding=conv.padding)  # type: ignore[arg-type]
    more = outputs - conv.out_channels
    with torch.no_grad():
        wider.weight.copy_(F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, more)))
        assert conv.bias is not None
        assert wider.bias is not None
        wider.bias.copy_(F.pad(conv.bias, (0, more)))
    return wider
