"""Encoded image → the square of uint8 pixels that a captioner's vision tower sees, or an image of bounded size.

`read` does on the CPU, without torch, what open_clip's evaluation transform does before its scaling to floats, so that
the workers which decode stay light and what travels to the model is a quarter of the size.
"""

from __future__ import annotations

import io
from typing import Final

import numpy as np
from PIL import Image

from capstan.pipeline.preprocess import CLIP_MEAN, CLIP_STD, FILTERS, MODES, Preprocessing, fit

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "FILTERS",
    "MODES",
    "QUALITY",
    "Preprocessing",
    "encoded_within",
    "fit",
    "read",
    "within",
]

QUALITY: Final = 95  # of JPEGs that are encoded anew


def read(data: bytes, how: Preprocessing) -> np.ndarray:
    """An encoded image as uint8 RGB [height, width, 3]. Raises OSError or SyntaxError where it cannot be decoded."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(fit(image.convert("RGB"), how))


def within(data: bytes, side: int | None) -> np.ndarray:
    """An encoded image as uint8 RGB, in its own proportions, its longer side at most `side` pixels (None: as it is).

    Raises OSError or SyntaxError where it cannot be decoded.
    """
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(_reduced(image.convert("RGB"), side))


def encoded_within(data: bytes, side: int | None) -> bytes:
    """`data` itself where it is a JPEG that fits into `side` pixels, else such a JPEG. Raises as `within` does."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")  # decodes all of it: what is broken is found here
        if image.format == "JPEG" and (side is None or max(image.size) <= side):
            return data
        file = io.BytesIO()
        _reduced(rgb, side).save(file, "JPEG", quality=QUALITY, subsampling=0)
        return file.getvalue()


def _reduced(image: Image.Image, side: int | None) -> Image.Image:
    longest = max(image.size)
    if side is None or longest <= side:
        return image
    width, height = (max(1, round(length * side / longest)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
