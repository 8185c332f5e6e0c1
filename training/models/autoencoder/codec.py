"""An opened first stage: images → latents → images, as evaluation sees it"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


class ImageCodec:
    """An AutoencoderKL or VQModel of diffusers for images of `size` pixels per side."""

    def __init__(self, vae: Any, size: int) -> None:
        self.vae, self.size = vae, size

    def reconstruct(self, images: np.ndarray, batch: int) -> np.ndarray:
        return reconstruct(self.vae, images, batch)

    def measures(self, images: np.ndarray, batch: int) -> Mapping[str, Mapping[str, float]]:
        return {}


def latents_of(vae: Any, images: np.ndarray, batch: int) -> Iterator[torch.Tensor]:
    """Yield the latents of uint8 images [N, H, W, 3] by batch: a VQModel's, or an AutoencoderKL's posterior mean."""
    for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(batch):
        with torch.no_grad():
            encoded = vae.encode(part.to(vae.device, vae.dtype) / 127.5 - 1)
        yield encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean


def reconstruct(vae: Any, images: np.ndarray, batch: int) -> np.ndarray:
    """Encode and decode uint8 images [N, H, W, 3]; return uint8 [N, H, W, 3]."""
    made = []
    for latents in latents_of(vae, images, batch):
        with torch.no_grad():
            decoded: torch.Tensor = vae.decode(latents).sample
        made.append(((decoded.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(made).permute(0, 2, 3, 1).numpy()
