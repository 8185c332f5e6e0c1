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
_HASH_CELLS: Final = 32
_LUMA: Final = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_SUMS_IN_INT32: Final = 2**31 // 255  # pixels


def fingerprints(rgb: np.ndarray) -> tuple[int, str]:
    """Return `phash` and `colours` of uint8 [H, W, 3], averaging its areas once."""
    cells = area_means(rgb, _HASH_CELLS)
    return _hash(cells), _mean_colours(cells)


def phash(rgb: np.ndarray) -> int:
    """Return the DCT hash of Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), 3.1.

    `rgb` is uint8 [H, W, 3]. Luma is averaged over 32 × 32 equal areas and transformed by a DCT. Each bit is set if one
    of the 8 × 8 lowest frequencies, first row and column left out, exceeds their median. A flat image hashes to 0.
    """
    return fingerprints(rgb)[0]


def colours(rgb: np.ndarray) -> str:
    """Return the mean colour of each of 4 × 4 cells of uint8 [H, W, 3], row by row: 48 bytes, in base64."""
    return fingerprints(rgb)[1]


def _hash(cells: np.ndarray) -> int:
    luma = (cells - cells[0, 0]) @ _LUMA  # a flat image yields exact zeros, not rounding noise
    low = cv2.dct(luma - luma.mean())[1:9, 1:9]
    ordered = np.sort(low, axis=None)  # np.median would take longer than the transform
    return int.from_bytes(np.packbits(low > (ordered[31] + ordered[32]) / 2).tobytes(), "big")


def _mean_colours(cells: np.ndarray) -> str:
    each = _HASH_CELLS // COLOUR_CELLS
    means = cells.reshape(COLOUR_CELLS, each, COLOUR_CELLS, each, 3).mean(axis=(1, 3))
    return base64.b64encode(np.round(means, 3).round().astype(np.uint8).tobytes()).decode()


def area_means(pixels: np.ndarray, cells: int) -> np.ndarray:
    """Return the mean of each of `cells` × `cells` equal areas of uint8 [H, W, C], as float64 [cells, cells, C].

    Borders of areas may cut pixels: each counts by the part that is inside, as with OpenCV's INTER_AREA, which takes
    four times as long. Sums come from the integral image, interpolated at the borders, which is exact.
    """
    height, width = pixels.shape[:2]
    depth = cv2.CV_32S if height * width < _SUMS_IN_INT32 else cv2.CV_64F
    sums = cv2.integral(pixels, sdepth=depth).reshape(height + 1, width + 1, -1)
    if height % cells == width % cells == 0:  # borders between pixels need no fractions: half the time
        return _means(sums[:: height // cells, :: width // cells], height * width)
    (row, down), (column, right) = _borders(height, cells), _borders(width, cells)
    upper, lower = (_between(sums[rows], column, right) for rows in (row, row + 1))
    return _means(upper + (lower - upper) * down[:, None, None], height * width)


def _means(corners: np.ndarray, pixels: int) -> np.ndarray:
    """Return the means of areas in an image of `pixels`, from the sums at their corners."""
    inside = np.diff(np.diff(corners, axis=0), axis=1)
    # Rounded, so that equal areas get equal values.
    return np.asarray(np.round(inside * (inside.shape[0] * inside.shape[1] / pixels), 6), np.float64)


def _between(sums: np.ndarray, column: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return [rows, W, C] at fractional columns."""
    before = sums[:, column]
    return before + (sums[:, column + 1] - before) * right[:, None]


def _borders(length: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the whole pixels before each border of `cells` equal parts, and the fraction of the next one."""
    place = np.arange(cells + 1) * length / cells
    whole = np.minimum(place.astype(np.int64), length - 1)
    return whole, place - whole


def read_colours(column: pa.ChunkedArray) -> np.ndarray:
    """Decode a column of `colours` to uint8 [n, COLOUR_BYTES]; zeros for rows without any ("")."""
    unknown = base64.b64encode(bytes(COLOUR_BYTES)).decode()
    parts = [np.zeros((0, COLOUR_BYTES), np.uint8)]
    for chunk in column.chunks:
        text = pc.if_else(pc.equal(chunk, ""), unknown, chunk)
        joined = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(text)], pa.int32()), text), "")
        parts.append(np.frombuffer(base64.b64decode(joined[0].as_buffer()), np.uint8).reshape(-1, COLOUR_BYTES))
    return np.concatenate(parts)
