"""Pixels → a 64-bit perceptual hash: near duplicates differ in few bits."""

from __future__ import annotations

import cv2
import numpy as np


def phash(rgb: np.ndarray) -> int:
    """The DCT hash of Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), 3.1.

    `rgb` is uint8 [H, W, 3]. Luma, shrunk to 32 × 32 by area; of its DCT the 8 × 8 lowest frequencies without the first
    row and column; a bit says whether a coefficient exceeds their median. A flat picture hashes to 0.
    """
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    factor = min(grey.shape) // 64
    if factor > 1:  # by a whole number first: OpenCV averages whole blocks several times faster
        height, width = grey.shape[0] // factor, grey.shape[1] // factor
        whole = grey[: height * factor, : width * factor]
        grey = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    luma = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
    low = cv2.dct(luma - luma.mean())[1:9, 1:9]  # mean first: a flat picture then gives exact zeros, not rounding noise
    ordered = np.sort(low, axis=None)  # np.median would take longer than the transform
    return int.from_bytes(np.packbits(low > (ordered[31] + ordered[32]) / 2).tobytes(), "big")
