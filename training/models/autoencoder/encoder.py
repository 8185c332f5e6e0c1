"""Images → latents of an AutoencoderKL, computed once before training (`capstan encode`)"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from capstan.training.data.transforms import cut, to_signed
from capstan.training.drawing.drawer import Size
from capstan.training.models.autoencoder.family import factor_of, load_autoencoder


class KlEncoder:
    """The AutoencoderKL at `path`, a run or a folder, which the recipe's key `field` names.

    A latent is [2 C, h, w]: the posterior's mean, then its standard deviation, before `scaling_factor`, so that a step
    can still sample from it.
    """

    def __init__(self, path: str, field: str) -> None:
        self.vae = load_autoencoder(path, field)
        self.factor, self.part = factor_of(self.vae.config), f"the autoencoder ({field})"

    def identity(self) -> dict[str, Any]:
        weights = digest_of(self.vae.state_dict(), ("encoder.", "quant_conv."))
        return {"weights": weights, "crop": "center", "factor": self.factor, "format": 1}

    def to(self, device: torch.device) -> None:
        self.vae.to(device).eval()

    def __call__(self, files: Sequence[bytes], size: Size) -> torch.Tensor:
        posterior = self.vae.encode(signed_images(files, size, self.vae.device)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)


def signed_images(files: Sequence[bytes], size: Size, device: torch.device) -> torch.Tensor:
    """Return JPEGs, cut to `size` (width, height), as float32 [N, 3, height, width] in −1 … 1."""
    images = np.stack([cut(jpeg, size) for jpeg in files])
    return to_signed(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device))


def digest_of(weights: Mapping[str, torch.Tensor], parts: tuple[str, ...]) -> str:
    """Return the SHA-256 of the weights whose names start with one of `parts`."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        if name.startswith(parts):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(weight.cpu().float().numpy()).tobytes())
    return digest.hexdigest()
