"""Encoded picture → the square of uint8 pixels that a captioner's vision tower sees."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.pixels import CLIP_MEAN, CLIP_STD, FILTERS, MODES, Preprocessing, fit

__all__ = ["CLIP_MEAN", "CLIP_STD", "FILTERS", "MODES", "Preprocessing", "fit", "read"]


def read(data: bytes, how: Preprocessing) -> np.ndarray:
    """An encoded picture as uint8 RGB [height, width, 3]. Raises OSError or SyntaxError where it cannot be decoded."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(fit(picture.convert("RGB"), how))
