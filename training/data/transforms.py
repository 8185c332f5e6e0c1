"""JPEG bytes → cropped images → tensors; size conditioning; PSNR

A stored image is scaled so that it just covers a square, or the size of its bucket, then cropped to it. Images that
already have that size are only decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.config.families import Crop
from capstan.training.family import Sample, Samples


def square(jpeg: bytes, size: int, *, rng: np.random.Generator | None = None, flip: bool = False) -> np.ndarray:
    """Return a uint8 RGB image [size, size, 3], cropped at the centre or at random by `rng`, mirrored if `flip`."""
    return cut(jpeg, (size, size), rng=rng, flip=flip)


def cut(
    jpeg: bytes, size: tuple[int, int], *, rng: np.random.Generator | None = None, flip: bool = False
) -> np.ndarray:
    """Return a uint8 RGB image [height, width, 3], scaled to cover `size` (width, height), cropped as in `square`."""
    # The decoder may scale down by itself, but not below the requested size.
    image = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", min_height=size[1], min_width=size[0])
    return fitted(image, size, rng=rng, flip=flip)


def fitted(
    image: np.ndarray, size: tuple[int, int], *, rng: np.random.Generator | None = None, flip: bool = False
) -> np.ndarray:
    """Return a uint8 RGB image, of any size, as `cut` returns that of a JPEG."""
    height, width = image.shape[:2]
    covering = _covering((width, height), size)
    if covering != (width, height):
        smaller = covering[0] < width or covering[1] < height
        image = cv2.resize(image, covering, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    top, left = _corner(covering, size, rng)
    image = image[top : top + size[1], left : left + size[0]]
    return np.ascontiguousarray(image[:, ::-1] if flip else image)


def _covering(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of the image, scaled to just cover `size`."""
    scale = max(size[0] / image[0], size[1] / image[1])
    return (max(size[0], round(image[0] * scale)), max(size[1], round(image[1] * scale)))


def _corner(scaled: tuple[int, int], size: tuple[int, int], rng: np.random.Generator | None) -> tuple[int, int]:
    """Return top and left of the crop of `size`: at the centre, or random by `rng`."""
    width, height = scaled[0] - size[0], scaled[1] - size[1]
    if rng is None:
        return height // 2, width // 2
    return int(rng.integers(height + 1)), int(rng.integers(width + 1))


def _choices(sample: Sample, crop: Crop, flip: bool) -> tuple[np.random.Generator | None, bool]:
    """Return a sample's random choices in this epoch: the generator for its crop (None: centre), whether to mirror."""
    rng = sample.rng()
    mirrored = flip and bool(rng.integers(2))
    return rng if crop == "random" else None, mirrored


def batch_of(samples: Sequence[Sample], size: int, *, crop: Crop = "center", flip: bool = False) -> torch.Tensor:
    """Return images as uint8 [B, 3, size, size], or with a bucket [B, 3, height, width].

    Random crops and flips differ by sample and epoch.
    """
    images = []
    for sample in samples:
        rng, mirrored = _choices(sample, crop, flip)
        images.append(cv2.split(cut(sample.jpeg, sample.bucket or (size, size), rng=rng, flip=mirrored)))
    # Not a torch operation: it would start an OpenMP team for the loader's thread. With more threads than cores OpenMP
    # sleeps instead of spinning between operations, which slowed down a step on two cores by a third.
    return torch.from_numpy(np.array(images))


def conditions_of(samples: Sequence[Sample], size: int, *, crop: Crop = "center", flip: bool = False) -> torch.Tensor:
    """Return SDXL's size conditions (Podell et al. 2023, section 2.2) for `batch_of`'s crops: int64 [B, 6].

    Original height and width, top and left of the crop, target height and width: diffusers' `add_time_ids`. The
    original size is the source's. Top and left are in pixels of the image as scaled for training; they include what was
    cropped when the dataset was built.
    """
    rows = []
    for sample in samples:
        rng, mirrored = _choices(sample, crop, flip)
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
    """Return (width, height) of a decoded JPEG: scaled by the smallest n/8 that still covers `size`."""
    scaled = ([-(-side * eighths // 8) for side in image] for eighths in range(1, 8))
    return next(((width, height) for width, height in scaled if width >= size[0] and height >= size[1]), image)


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 0 … 255 to float32 −1 … 1, the range of diffusers' models."""
    return pixels.float() / 127.5 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB of each pair of images [B, 3, H, W] in −1 … 1: 10 log10(2² / MSE), [B]."""
    error = (a.float() - b.float()).square().flatten(1).mean(1).clamp(min=1e-10)
    return 10 * torch.log10(4 / error)


def image_size(samples: Samples, wanted: int | None, multiple: int, field: str) -> int:
    """Return the side in pixels to train at: `wanted`, or the first image's shorter side, rounded down to a `multiple`.

    Raises RecipeError naming `field` if `wanted` is not a multiple.
    """
    if wanted is None:
        first = samples.sample(0)
        wanted = min(first.width, first.height) // multiple * multiple
    if wanted <= 0 or wanted % multiple:
        near = max(multiple, round(wanted / multiple) * multiple)
        raise RecipeError(field, f"{wanted} pixels do not divide by {multiple}", f"use e.g. size: {near}")
    return wanted
