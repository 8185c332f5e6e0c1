"""Arrays of a value per row; large ones lie on the scratch disk

Values of many rows belong to the system's cache, as memory allows, not to this process's own memory. They are written
and read in pieces, after which the process returns their pages. So selecting takes as much memory for a billion rows as
for some millions, and a disk for the rest.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from capstan.pipeline.storage.local import as_disk_full

MAPPED_ROWS: Final = 1 << 20  # from this many rows, arrays are files
_PIECE: Final = 1 << 18  # rows

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Rows = slice | Ints


class LargeArrays:
    """Arrays of `rows` values each, by name."""

    def __init__(self, rows: int) -> None:
        self.rows, self._arrays = rows, dict[str, Array]()

    def put(self, name: str, start: int, values: Array) -> None:
        """Set the values of the rows from `start`. Type and width follow from the first values."""
        if name not in self._arrays:
            self._arrays[name] = empty(self.rows, values)
        self._arrays[name][start : start + len(values)] = values
        release(self._arrays[name])

    def array(self, name: str, empty: Array) -> Array:
        """Return an array that is filled; one like `empty` if there are no rows."""
        return self._arrays[name] if self.rows else empty


def empty(rows: int, like: Array | npt.DTypeLike) -> Array:
    """Return an array of as many values of the type and width of `like`; a large one is a file, gone with the array.

    Raises DiskFull.
    """
    dtype, width = (like.dtype, like.shape[1:]) if isinstance(like, np.ndarray) else (np.dtype(like), ())
    if rows < MAPPED_ROWS:
        return np.empty((rows, *width), dtype)
    with tempfile.TemporaryFile(prefix="capstan-") as file:
        size = rows * dtype.itemsize * int(np.prod(width, dtype=np.int64))
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))  # a full disk would otherwise kill the process
        except OSError as error:
            if full := as_disk_full(error, Path(tempfile.gettempdir()), size):
                raise full from None
            raise
        return np.memmap(file, dtype, "r+", shape=(rows, *width))


def filled(rows: int, value: Any, dtype: npt.DTypeLike) -> Array:
    """Return an array of as many equal values."""
    made = empty(rows, dtype)
    for piece in pieces(rows):
        made[piece] = value
    return release(made)


def made_of(rows: int, of: Callable[[slice], Array], dtype: npt.DTypeLike) -> Array:
    """Return the array whose values in each piece of the rows are of(piece)."""
    made = empty(rows, dtype)
    for piece in pieces(rows):
        made[piece] = of(piece)
    return release(made)


def copied(values: Array) -> Array:
    """Return a copy of an array."""
    return made_of(len(values), lambda piece: values[piece], values.dtype)


def pieces(rows: int) -> Iterator[slice]:
    """Yield all rows in order, in slices of some hundred thousand."""
    return (slice(start, min(start + _PIECE, rows)) for start in range(0, rows, _PIECE))


def numbers(rows: Rows) -> Ints:
    """Return the numbers of rows."""
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


def numbered(rows: int) -> Ints:
    """Return the numbers of all rows."""
    return made_of(rows, numbers, np.int64)


def joined(parts: Iterable[Array], dtype: npt.DTypeLike) -> Array:
    """Return the values of all parts, one after the other."""
    held, count = list[Array](), 0
    left = iter(parts)
    for part in left:
        held, count = [*held, part], count + len(part)
        if count >= MAPPED_ROWS:
            break
    else:
        return np.concatenate([np.empty(0, dtype), *held])
    with tempfile.TemporaryFile(prefix="capstan-") as file:
        rows = 0
        try:
            for part in _chain(held, left):
                file.write(np.ascontiguousarray(part, dtype).data)
                rows += len(part)
            file.flush()
        except OSError as error:
            if full := as_disk_full(error, Path(tempfile.gettempdir())):
                raise full from None
            raise
        return np.memmap(file, dtype, "r+", shape=(rows,))


def _chain(held: list[Array], left: Iterator[Array]) -> Iterator[Array]:
    while held:
        yield held.pop(0)  # and it is no longer held here
    yield from left


def which(rows: int, test: Callable[[slice], npt.NDArray[np.bool_]]) -> Ints:
    """Return the rows, in order, that pass a test of the rows of a slice."""
    return joined((piece.start + np.flatnonzero(test(piece)) for piece in pieces(rows)), np.int64)


def count(rows: int, test: Callable[[slice], npt.NDArray[np.bool_]]) -> int:
    """Return how many rows pass a test of the rows of a slice."""
    return sum(int(np.count_nonzero(test(piece))) for piece in pieces(rows))


def tally(values: Array) -> Counter[int]:
    """Return how often each of the integers occurs."""
    found = Counter[int]()
    for piece in pieces(len(values)):
        numbers, counts = np.unique(values[piece], return_counts=True)
        found.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
    release(values)
    return found


def taken(values: Array, rows: Ints) -> Array:
    """Return the values of `rows`; all values as they are, without a copy, if `rows` are all rows in order."""
    if len(rows) == len(values) and all(
        (rows[own] == np.arange(own.start, own.stop)).all() for own in pieces(len(rows))
    ):
        return values
    found = empty(len(rows), values)
    for piece in pieces(len(rows)):
        found[piece] = values[rows[piece]]
    release(values, rows)
    return release(found)


def release(*arrays: Array) -> Array:
    """Return the first array, after dropping the arrays' pages from this process's memory; they stay in the file."""
    for array in arrays:
        mapped = getattr(array, "_mmap", None)
        if mapped is not None and array.nbytes:
            place = array.ctypes.data - np.frombuffer(mapped, np.uint8, 1).ctypes.data
            start = place // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, start, place - start + array.nbytes)
    return arrays[0]
