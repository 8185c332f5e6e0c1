"""Rows with equal values → the first of each, in order of precedence"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np
import numpy.typing as npt

from capstan.pipeline.select.apart import Apart

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def as_words(values: npt.NDArray[np.bytes_] | Words) -> Words:
    """Convert text of one width to 64-bit words [n, w]; words are returned unchanged."""
    if values.dtype.kind != "S":
        return cast(Words, values)
    width = -(-max(values.dtype.itemsize, 1) // 8) * 8
    return np.ascontiguousarray(values.astype(f"S{width}", copy=False)).view(np.uint64).reshape(len(values), width // 8)


def first_equal(columns: Iterable[Words] | Words, order: Ints) -> Ints:
    """Return for each of n rows of `columns`, each [n], the equal row that is first in `order`.

    The columns are gone through more than once.

    Rows are sorted by a hash of their words; all words are compared afterwards, so collisions cannot change the result.
    """
    n = len(order)
    if not n:
        return np.zeros(0, np.int64)
    rank = np.empty(n, np.int64)
    rank[order] = np.arange(n)
    mixed = np.zeros(n, np.uint64)
    for column in columns:
        mixed = (mixed * np.uint64(0x9E3779B97F4A7C15)) ^ column
    by = np.argsort(mixed)
    mixed = mixed[by]
    starts = np.flatnonzero(np.concatenate([[True], mixed[1:] != mixed[:-1]]))
    least = np.minimum.reduceat(rank[by], starts)
    first = np.empty(n, np.int64)
    first[by] = np.repeat(order[least], np.diff(starts, append=n))
    (repeats,) = np.nonzero(first != np.arange(n))
    if not all((column[first[repeats]] == column[repeats]).all() for column in columns):
        _, inverse = np.unique(np.stack([*columns], axis=1), axis=0, return_inverse=True)
        return first_equal([inverse.astype(np.uint64).reshape(-1)], order)
    return first


def decide_equal(kept: Ints, first: Ints, order: Ints, apart: Apart) -> None:
    """Decide on rows that are equal to one of a pair: each repeats the first kept one that it is not apart from.

    `first` is the first of all rows equal to a row, in `order`; `kept` is changed.
    """
    held: dict[int, list[int]] = {group: [] for group in np.unique(first[apart.rows]).tolist()}
    for row in order[np.isin(first[order], list(held))].tolist():
        others = held[int(first[row])]
        near = np.array(others, np.int64)[~apart.has(np.full(len(others), row), np.array(others, np.int64))]
        kept[row] = near[0] if len(near) else -1
        if not len(near):
            others.append(row)
