"""Clips → latents of an AutoencoderKL, frame by frame, computed once before training (`capstan encode`)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from capstan.training.data.clips import file_frames
from capstan.training.data.transforms import to_signed
from capstan.training.drawing.drawer import Size
from capstan.training.models.autoencoder.encoder import KlEncoder

_AT_ONCE: Final = 32  # frames: always the same, so that latents do not depend on the machine


class ClipEncoder(KlEncoder):
    """The AutoencoderKL of the image run at `path`, over `frames` frames at `fps` of each clip.

    A latent is [frames, 2 C, h, w]: each frame's mean, then its standard deviation. That of an image is its single
    frame's, and zeros: no posterior has a standard deviation of 0.
    """

    def __init__(self, path: str, field: str, frames: int, fps: float | None) -> None:
        super().__init__(path, field)
        self.frames, self.fps = frames, fps

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"frames": self.frames, "fps": self.fps}

    def __call__(self, files: Sequence[bytes], size: Size) -> torch.Tensor:
        shown = [file_frames(file, self.frames, self.fps, size) for file in files]
        pictures = torch.from_numpy(np.concatenate(shown).transpose(0, 3, 1, 2).copy())
        latents = torch.cat([self._encoded(part) for part in pictures.split(_AT_ONCE)])
        clips = latents.split([len(one) for one in shown])
        return torch.stack([torch.cat([one, one.new_zeros(self.frames - len(one), *one.shape[1:])]) for one in clips])

    def _encoded(self, pictures: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode(to_signed(pictures.to(self.vae.device))).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)


def is_image(latent: np.ndarray) -> bool:
    """Return whether a latent [frames, 2 C, h, w] is of an image."""
    return not latent[1:].any()
