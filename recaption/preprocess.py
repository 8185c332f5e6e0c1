"""Encoded image → uint8 pixels for a vision tower, or an image of bounded size

`read` does on the CPU, without torch, what open_clip's evaluation transform does before it scales to floats: CPU
workers stay light, and a quarter of the bytes travels to the model.
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

QUALITY: Final = 95  # of re-encoded JPEGs


def read(data: bytes, how: Preprocessing) -> np.ndarray:
    """Decode an image to uint8 RGB [height, width, 3]. Raises OSError or SyntaxError if it cannot be decoded."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(fit(image.convert("RGB"), how))


def within(data: bytes, side: int | None) -> np.ndarray:
    """Decode an image to uint8 RGB [height, width, 3], shrunk to a longer side of at most `side` pixels (None: as is).

    Proportions are kept. Raises OSError or SyntaxError if it cannot be decoded.
    """
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(_reduced(image.convert("RGB"), side))


def encoded_within(data: bytes, side: int | None) -> bytes:
    """Return `data` if it is a JPEG of at most `side` pixels, else re-encode it as one. Raises as `within` does."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")  # decodes the whole image, so damage is found here
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
