"""Pixels → a 64-bit perceptual hash, and coarse colours.

Near duplicates differ in few bits of the hash. It sees brightness only, so the mean colours of a 4 × 4 grid are kept
alongside it.
"""

from __future__ import annotations

import base64
from typing import Final

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

COLOUR_CELLS: Final = 4  # cells of the colour signature, each way
COLOUR_BYTES: Final = 3 * COLOUR_CELLS**2


def phash(rgb: np.ndarray) -> int:
    """Return the DCT hash of Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), 3.1.

    `rgb` is uint8 [H, W, 3]. Luma is shrunk to 32 × 32 by area and transformed by a DCT. Each bit is set if one of the
    8 × 8 lowest frequencies, first row and column left out, exceeds their median. A flat image hashes to 0.
    """
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    luma = cv2.resize(_smaller(grey), (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
    low = cv2.dct(luma - luma.mean())[1:9, 1:9]  # mean first: a flat image then gives exact zeros, not rounding noise
    ordered = np.sort(low, axis=None)  # np.median would take longer than the transform
    return int.from_bytes(np.packbits(low > (ordered[31] + ordered[32]) / 2).tobytes(), "big")


def colours(rgb: np.ndarray) -> str:
    """Return the mean colour of each of 4 × 4 cells of uint8 [H, W, 3], row by row: 48 bytes, in base64."""
    cells = cv2.resize(_smaller(rgb), (COLOUR_CELLS, COLOUR_CELLS), interpolation=cv2.INTER_AREA)
    return base64.b64encode(cells.tobytes()).decode()


def read_colours(column: pa.ChunkedArray) -> np.ndarray:
    """Decode a column of `colours` to uint8 [n, COLOUR_BYTES]; zeros for rows without any ("")."""
    unknown = base64.b64encode(bytes(COLOUR_BYTES)).decode()
    parts = [np.zeros((0, COLOUR_BYTES), np.uint8)]
    for chunk in column.chunks:
        text = pc.if_else(pc.equal(chunk, ""), unknown, chunk)
        joined = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(text)], pa.int32()), text), "")
        parts.append(np.frombuffer(base64.b64decode(joined[0].as_buffer()), np.uint8).reshape(-1, COLOUR_BYTES))
    return np.concatenate(parts)


def _smaller(pixels: np.ndarray) -> np.ndarray:
    """Halve until fewer than 128 pixels remain: OpenCV averages 2 × 2 several times faster than any other block."""
    while min(pixels.shape[:2]) >= 128:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        pixels = cv2.resize(pixels[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    return pixels
