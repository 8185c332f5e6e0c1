"""Rows by mask and prefix: those that agree on the bits of a mask, in blocks of a few thousand

Only hashes that agree on all bits of a mask are compared, so a mask splits the rows into blocks between which nothing
is compared. Each thread works on a block of one mask. Blocks of many rows lie on the scratch disk, so memory is that of
the blocks at hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from capstan.pipeline.select.arrays.large_arrays import Array, numbered
from capstan.pipeline.select.arrays.partitions import Numbers, scattered

BLOCK_ROWS: Final = 1 << 14  # of a block, on average, unless that makes more blocks than can be numbered
_MOST_BITS: Final = 15
MIX: Final = np.uint64(0x9E3779B97F4A7C15)

Words = npt.NDArray[np.uint64]
T = TypeVar("T")


def block_bits(rows: int) -> int:
    """Return how many bits number the blocks of that many rows."""
    return min(_MOST_BITS, max(0, (rows // BLOCK_ROWS).bit_length() - 1))


def blocks_of(hashes: Words, mask: int, bits: int) -> list[list[Array]]:
    """Return the rows and hashes of each of 2**bits blocks, in order.

    Hashes that agree on the bits of `mask` share a block.
    """
    if not bits:
        return [[numbered(len(hashes)), hashes]]

    def number_of(piece: slice) -> Numbers:
        mixed = (hashes[piece] & np.uint64(mask)) * MIX
        return np.asarray(mixed >> np.uint64(64 - bits), np.uint16)

    return scattered([None, hashes], number_of, 1 << bits)


def in_threads(work: Callable[[int], T], count: int) -> Generator[T, None, None]:
    """Yield work(0), work(1), … in order, using threads: numpy sorts and compares without Python's lock."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(work, range(count))
