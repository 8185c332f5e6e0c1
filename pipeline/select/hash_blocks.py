"""Rows by mask and prefix: those that agree on the bits of a mask, in blocks of a few thousand

Only hashes that agree on all bits of a mask are compared, so a mask splits the rows into blocks between which nothing
is compared. Each thread works on a block of one mask, and memory is that of one partition of the rows (9 bytes a row),
however many threads there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

BLOCK_ROWS: Final = 1 << 14  # of a block, on average, unless that makes more than 256 blocks
_SCANNED: Final = 1 << 20  # rows
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
T = TypeVar("T")


def block_bits(rows: int) -> int:
    """Return how many bits number the blocks of that many rows."""
    return min(8, max(0, (rows // BLOCK_ROWS).bit_length() - 1))


def blocks_of(hashes: Words, mask: int, bits: int) -> list[Ints]:
    """Return the rows of each of 2**bits blocks, in order: hashes that agree on the bits of `mask` share a block."""
    if not bits:
        return [np.arange(len(hashes))]
    numbers = np.empty(len(hashes), np.uint8)
    for start in range(0, len(hashes), _SCANNED):
        part = slice(start, start + _SCANNED)
        numbers[part] = ((hashes[part] & np.uint64(mask)) * _MIX) >> np.uint64(64 - bits)
    order = np.argsort(numbers, kind="stable")  # a radix sort
    ends = np.cumsum(np.bincount(numbers, minlength=1 << bits))
    return np.split(order, ends[:-1])


def in_threads(work: Callable[[int], T], count: int) -> Generator[T, None, None]:
    """Yield work(0), work(1), … in order, using threads: numpy sorts and compares without Python's lock."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(work, range(count))
