"""Aspect ratios of a shard's images: a histogram that fits into the manifest

A ratio (width / height) is counted in one of `CELLS` cells of equal width on a logarithmic scale, 32 per octave; the
middle one has the squares. Readers make batches of one aspect ratio from these counts, without a shard's table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_PER_OCTAVE: Final = 32
_OCTAVES: Final = 3  # from 1:8 to 8:1; what lies outside is counted in the last cell
HISTOGRAM: Final = re.compile(r"\*?[0-9]{1,9}( \*?[0-9]{1,9}){0,400}")
CELLS: Final = 2 * _OCTAVES * _PER_OCTAVE + 1


def cells_of(widths: npt.NDArray[np.int64], heights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the cell of each image (int64 [images], 0 the tallest). An image of unknown size (0) counts as a square.

    The border between two cells is no ratio of integers, so rounding is the same on every machine.
    """
    known = (widths > 0) & (heights > 0)
    ratios = np.where(known, widths, 1) / np.where(known, heights, 1)
    middle = _OCTAVES * _PER_OCTAVE
    return np.clip(np.rint(np.log2(ratios) * _PER_OCTAVE), -middle, middle).astype(np.int64) + middle


def ratios_of_cells() -> npt.NDArray[np.float64]:
    """Return log2 of the ratio in the middle of each cell (float64 [CELLS])."""
    return (np.arange(CELLS) - _OCTAVES * _PER_OCTAVE) / _PER_OCTAVE


def write_histogram(widths: npt.NDArray[np.int64], heights: npt.NDArray[np.int64]) -> str:
    """Return the counts of all cells as text: numbers, and `*n` for n empty cells.

    >>> write_histogram(np.array([512, 512, 768]), np.array([512, 512, 512]))
    '*96 2 *18 1 *77'
    """
    counts = np.bincount(cells_of(widths, heights), minlength=CELLS).tolist()
    words: list[str] = []
    for empty, cells in groupby(counts, key=lambda count: count == 0):
        run = list(cells)
        words += [f"*{len(run)}"] if empty else [str(count) for count in run]
    return " ".join(words)


def ratios_of(table: pa.Table) -> str:
    """Return the histogram of a shard's table."""
    return write_histogram(table["width"].to_numpy(), table["height"].to_numpy())


def read_histograms(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the counts of all cells of each text (int64 [texts, CELLS]). Raises ValueError if one is not a histogram.

    >>> counts = read_histograms(["*96 2 *18 1 *77", "3 *192"])
    >>> int(counts[0, 96]), int(counts[0, 115]), int(counts[1, 0]), counts.sum(1).tolist()
    (2, 1, 3, [3, 3])
    """
    for text in texts:
        if not HISTOGRAM.fullmatch(text):
            raise ValueError(f"{text[:80]!r} is not a histogram")
    words = np.array([text.count(" ") + 1 for text in texts])
    values = np.fromstring(" ".join(texts).replace("*", "-"), np.int64, sep=" ")
    ends = np.cumsum(np.where(values < 0, -values, 1))
    if (ends[np.cumsum(words) - 1] != np.arange(1, len(texts) + 1) * CELLS).any():
        raise ValueError(f"a histogram has other than {CELLS} cells")
    counts = np.zeros(len(texts) * CELLS, np.int64)
    counts[ends[values >= 0] - 1] = values[values >= 0]
    return counts.reshape(len(texts), CELLS)
