"""Clips → latents of an AutoencoderKLCogVideoX, computed once before training (`capstan encode`)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.data.clips import file_frames
from capstan.training.data.transforms import to_signed
from capstan.training.drawing.drawer import Size
from capstan.training.models.autoencoder.encoder import digest_of
from capstan.training.models.autoencoder.family import factor_of
from capstan.training.models.video_autoencoder.model import latent_frames
from capstan.training.product import find_product


class CausalEncoder:
    """The AutoencoderKLCogVideoX at `path`, over the largest of `lengths` frames at `fps` that a clip has.

    A latent is [frames, 2 C, h, w]: along time, each one's mean and then its standard deviation; zeros follow where a
    clip is shorter than the longest. No posterior has a standard deviation of 0.
    """

    def __init__(self, path: str, field: str, lengths: Sequence[int], fps: float | None) -> None:
        self.vae, self.lengths, self.fps = load_video_autoencoder(path, field), sorted(lengths), fps
        self.factor, self.part = factor_of(self.vae.config), f"the video autoencoder ({field})"
        self.length = latent_frames(self.lengths[-1], self.vae.config.temporal_compression_ratio)

    def identity(self) -> dict[str, Any]:
        weights = digest_of(self.vae.state_dict(), ("encoder.",))
        return {"weights": weights, "frames": self.lengths, "fps": self.fps, "factor": self.factor, "format": 1}

    def to(self, device: torch.device) -> None:
        self.vae.to(device).eval()

    def __call__(self, files: Sequence[bytes], size: Size) -> torch.Tensor:
        return torch.stack([self._encoded(file_frames(file, self.lengths, self.fps, size)) for file in files])

    def _encoded(self, frames: np.ndarray) -> torch.Tensor:
        clip = torch.from_numpy(frames.transpose(3, 0, 1, 2).copy())[None].to(self.vae.device)
        posterior = self.vae.encode(to_signed(clip).to(self.vae.dtype)).latent_dist
        made = torch.cat([posterior.mean, posterior.std], dim=1)[0].transpose(0, 1)
        missing = made.new_zeros(self.length - len(made), *made.shape[1:])
        return torch.cat([made, missing])


def counted(latents: Sequence[np.ndarray]) -> np.ndarray:
    """Return how many of the frames of each latent [frames, 2 C, h, w] are there: int64 [B]."""
    return np.array([int(latent.any(axis=(1, 2, 3)).sum()) for latent in latents], np.int64)


def load_video_autoencoder(path: str, field: str) -> Any:
    """Load the AutoencoderKLCogVideoX at `path`: a run, a product, or the vae/ of a pipeline. Raises RecipeError."""
    from diffusers import AutoencoderKLCogVideoX

    folder = find_product(path, field)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    try:
        return AutoencoderKLCogVideoX.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        problem = f"{folder} is not an AutoencoderKLCogVideoX ({error})"
        raise RecipeError(field, problem, "name a run of model: video_autoencoder") from None
