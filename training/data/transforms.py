"""JPEG bytes → images of one size → tensors, and what a model is told of the cuts; and how alike images are.

A stored image is scaled so that it just covers a square, or the size of its bucket, and cut to that. Images that
already have that size are only decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import simplejpeg
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.family import Sample, Samples

Crop = Literal["center", "random"]


def square(jpeg: bytes, size: int, *, rng: np.random.Generator | None = None, flip: bool = False) -> np.ndarray:
    """The image as uint8 RGB [size, size, 3]: cut in the middle, or where `rng` says; mirrored if `flip`."""
    return cut(jpeg, (size, size), rng=rng, flip=flip)


def cut(
    jpeg: bytes, size: tuple[int, int], *, rng: np.random.Generator | None = None, flip: bool = False
) -> np.ndarray:
    """The image as uint8 RGB [height, width, 3], scaled to cover `size` (width, height) and cut to it as `square`."""
    # The decoder may scale down by itself, as long as it stays above the size that is asked for.
    image = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", min_height=size[1], min_width=size[0])
    height, width = image.shape[:2]
    covering = _covering((width, height), size)
    if covering != (width, height):
        smaller = covering[0] < width or covering[1] < height
        image = cv2.resize(image, covering, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    top, left = _corner(covering, size, rng)
    image = image[top : top + size[1], left : left + size[0]]
    return np.ascontiguousarray(image[:, ::-1] if flip else image)


def _covering(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the image, scaled as little as covers `size`."""
    scale = max(size[0] / image[0], size[1] / image[1])
    return (max(size[0], round(image[0] * scale)), max(size[1], round(image[1] * scale)))


def _corner(scaled: tuple[int, int], size: tuple[int, int], rng: np.random.Generator | None) -> tuple[int, int]:
    """Top and left of the part of `size` that is kept: in the middle, or drawn."""
    width, height = scaled[0] - size[0], scaled[1] - size[1]
    if rng is None:
        return height // 2, width // 2
    return int(rng.integers(height + 1)), int(rng.integers(width + 1))


def _drawn(sample: Sample, crop: Crop, flip: bool) -> tuple[np.random.Generator | None, bool]:
    """What a sample draws in this epoch: the randomness of its cut (None: cut in the middle), and whether to mirror."""
    rng = sample.rng()
    mirrored = flip and bool(rng.integers(2))
    return rng if crop == "random" else None, mirrored


def batch_of(samples: Sequence[Sample], size: int, *, crop: Crop = "center", flip: bool = False) -> torch.Tensor:
    """Images as uint8 [B, 3, size, size], or of the samples' bucket [B, 3, height, width].

    With `crop: random` or `flip` drawn anew for each sample and epoch.
    """
    images = []
    for sample in samples:
        rng, mirrored = _drawn(sample, crop, flip)
        images.append(cv2.split(cut(sample.jpeg, sample.bucket or (size, size), rng=rng, flip=mirrored)))
    # No operation of torch's: it would start an OpenMP team for the loader's thread, and with more threads than cores
    # OpenMP's sleep instead of spinning between operations, which cost a step on two cores a third of its speed.
    return torch.from_numpy(np.array(images))


def conditions_of(samples: Sequence[Sample], size: int, *, crop: Crop = "center", flip: bool = False) -> torch.Tensor:
    """What SDXL is told of each image (Podell et al. 2023, section 2.2), of `batch_of`'s cuts: int64 [B, 6].

    Original height and width, top and left of the cut, target height and width: diffusers' `add_time_ids`. The original
    is the source's size; top and left count pixels of the image as it is scaled for training, what was cut off when
    the dataset was built included.
    """
    rows = []
    for sample in samples:
        rng, mirrored = _drawn(sample, crop, flip)
        target = sample.bucket or (size, size)
        stored = (sample.width or target[0], sample.height or target[1])
        scaled = _covering(_decoded(stored, target), target)
        top, left = _corner(scaled, target, rng)
        if mirrored:
            left = scaled[0] - target[0] - left
        top += round(sample.crop_top * scaled[1] / stored[1])
        left += round(sample.crop_left * scaled[0] / stored[0])
        original = (sample.original_height or stored[1], sample.original_width or stored[0])
        rows.append([*original, top, left, target[1], target[0]])
    return torch.tensor(rows)


def _decoded(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a JPEG as the decoder gives it: scaled by the least of n/8 that still covers `size`."""
    scaled = ([-(-side * eighths // 8) for side in image] for eighths in range(1, 8))
    return next(((width, height) for width, height in scaled if width >= size[0] and height >= size[1]), image)


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0 … 255 → float32 −1 … 1, the range that diffusers' models work in."""
    return pixels.float() / 127.5 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each pair of images [B, 3, H, W] in −1 … 1: 10 log10(2² / MSE), [B]."""
    error = (a.float() - b.float()).square().flatten(1).mean(1).clamp(min=1e-10)
    return 10 * torch.log10(4 / error)


def image_size(samples: Samples, wanted: int | None, multiple: int, field: str) -> int:
    """The side in pixels to train at: `wanted`, or the first image's shorter side, cut to a `multiple`."""
    if wanted is None:
        first = samples.sample(0)
        wanted = min(first.width, first.height) // multiple * multiple
    if wanted <= 0 or wanted % multiple:
        near = max(multiple, round(wanted / multiple) * multiple)
        raise RecipeError(field, f"{wanted} pixels do not divide by {multiple}", f"use e.g. size: {near}")
    return wanted
