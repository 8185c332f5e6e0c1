"""Arrays of a value per row, filled block by block; large ones lie on the scratch disk

Keys, sums and colours are 96 of the 114 bytes that a selection keeps of a row, and are read rarely: by the system's
cache as memory allows, not by this process's own memory.
"""

from __future__ import annotations

import tempfile
from typing import Any, Final

import numpy as np
import numpy.typing as npt

MAPPED_ROWS: Final = 1 << 20  # from this many rows, wide values are kept on disk
_WIDE_BYTES: Final = 16  # per row
_COPIED: Final = 1 << 18  # rows

Array = npt.NDArray[Any]


class LargeArrays:
    """Arrays of `rows` values each, by name."""

    def __init__(self, rows: int) -> None:
        self.rows, self._arrays = rows, dict[str, Array]()

    def put(self, name: str, start: int, values: Array) -> None:
        """Set the values of the rows from `start`. Type and width follow from the first values."""
        if name not in self._arrays:
            self._arrays[name] = self._empty(values)
        self._arrays[name][start : start + len(values)] = values

    def array(self, name: str, empty: Array) -> Array:
        """Return an array that is filled; one like `empty` if there are no rows."""
        return self._arrays[name] if self.rows else empty

    def _empty(self, values: Array) -> Array:
        return _empty(self.rows, values)


def _empty(rows: int, like: Array) -> Array:
    """Return an array of as many values like others; a large one is on disk, and gone with the array."""
    shape = (rows, *like.shape[1:])
    if rows < MAPPED_ROWS or like[:1].nbytes < _WIDE_BYTES:
        return np.empty(shape, like.dtype)
    with tempfile.TemporaryFile(prefix="capstan-") as file:
        return np.memmap(file, like.dtype, "w+", shape=shape)


def taken(values: Array, rows: npt.NDArray[np.int64]) -> Array:
    """Return the values of `rows`, which are sorted; all values as they are, without a copy."""
    if len(rows) == len(values):
        return values
    found = _empty(len(rows), values)
    for start in range(0, len(rows), _COPIED):
        found[start : start + _COPIED] = values[rows[start : start + _COPIED]]
    return found
