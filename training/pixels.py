"""JPEG bytes → square pictures of one size → tensors; and pictures → how alike they are.

A stored picture is scaled so that its shorter side is `size` and cut to a square. Pictures that already have that size
are only decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import simplejpeg
import torch

from pipeline.errors import RecipeError
from training.family import Sample, Samples

Crop = Literal["center", "random"]


def square(jpeg: bytes, size: int, *, rng: np.random.Generator | None = None, flip: bool = False) -> np.ndarray:
    """The picture as uint8 RGB [size, size, 3]: cut in the middle, or where `rng` says; mirrored if `flip`."""
    # The decoder may scale down by itself, as long as it stays above the size that is asked for.
    image = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", min_height=size, min_width=size)
    height, width = image.shape[:2]
    if min(height, width) != size:
        scale = size / min(height, width)
        target = (max(size, round(width * scale)), max(size, round(height * scale)))
        image = cv2.resize(image, target, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        height, width = image.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    if rng is not None:
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    image = image[top : top + size, left : left + size]
    return np.ascontiguousarray(image[:, ::-1] if flip else image)


def batch_of(samples: Sequence[Sample], size: int, *, crop: Crop = "center", flip: bool = False) -> torch.Tensor:
    """Pictures as uint8 [B, 3, size, size]; with `crop: random` or `flip` drawn anew for each sample and epoch."""
    images = []
    for sample in samples:
        rng = sample.rng()
        mirrored = flip and bool(rng.integers(2))
        images.append(square(sample.jpeg, size, rng=rng if crop == "random" else None, flip=mirrored))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0 … 255 → float32 −1 … 1, the range that diffusers' models work in."""
    return pixels.float() / 127.5 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each pair of pictures [B, 3, H, W] in −1 … 1: 10 log10(2² / MSE), [B]."""
    error = (a.float() - b.float()).square().flatten(1).mean(1).clamp(min=1e-10)
    return 10 * torch.log10(4 / error)


def picture_size(samples: Samples, wanted: int | None, multiple: int, field: str) -> int:
    """The side in pixels to train at: `wanted`, or the first picture's shorter side, cut to a `multiple`."""
    if wanted is None:
        first = samples.sample(0)
        wanted = min(first.width, first.height) // multiple * multiple
    if wanted <= 0 or wanted % multiple:
        near = max(multiple, round(wanted / multiple) * multiple)
        raise RecipeError(field, f"{wanted} pixels do not divide by {multiple}", f"use e.g. size: {near}")
    return wanted
