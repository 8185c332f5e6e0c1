"""Convert pixels from an embedded ICC profile to sRGB.

A profile that cannot be used (damaged, or made for another kind of pixels) is ignored, as in browsers: the image is
then treated as if it had none.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode → ICC's data colour space


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert `image` (mode L, RGB or CMYK) to sRGB, mode RGB; without a usable profile, by plain conversion."""
    transform = _transform(profile, image.mode)
    if transform is None:
        return image.convert("RGB")
    return ImageCms.applyTransform(image, transform) or image


def is_srgb(profile: bytes) -> bool:
    """Return whether RGB pixels are already sRGB: no profile, an unusable one, or a profile of sRGB itself."""
    return _transform(profile, "RGB") is None


@lru_cache(maxsize=32)  # photographs share few profiles, and building a transform takes milliseconds
def _transform(profile: bytes, mode: str) -> Any:
    """Return the transform to sRGB, or None if it would change nothing or cannot be built."""
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    return None if mode == "RGB" and _changes_nothing(transform) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether a grid of 17³ colours changes by at most 2 levels: rounding, not another colour space."""
    steps = np.linspace(0, 255, 17).astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(17, -1, 3)
    shown = ImageCms.applyTransform(Image.fromarray(grid), transform)
    return bool(np.abs(np.asarray(shown, dtype=np.int16) - grid).max() <= 2)
