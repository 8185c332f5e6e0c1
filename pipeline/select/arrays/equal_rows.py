"""Rows with equal values → the first of each, in order of precedence"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from capstan.pipeline.select.arrays.apart import Apart
from capstan.pipeline.select.arrays.large_arrays import Ints, Rows, empty, made_of, numbered, pieces, release
from capstan.pipeline.select.arrays.partitions import PART_ROWS, Part, parts

Words = npt.NDArray[np.uint64]
Columns = Callable[[Rows], Sequence[Words]]  # rows → their values by column, [rows] each

_MIX = np.uint64(0x9E3779B97F4A7C15)


def as_words(values: npt.NDArray[np.bytes_] | Words) -> Words:
    """Convert text of one width to 64-bit words [n, w]; words are returned unchanged."""
    if values.dtype.kind != "S":
        return cast(Words, values)
    width = -(-max(values.dtype.itemsize, 1) // 8) * 8
    return np.ascontiguousarray(values.astype(f"S{width}", copy=False)).view(np.uint64).reshape(len(values), width // 8)


def first_equal(columns: Columns, order: Ints) -> Ints:
    """Return for each of n rows of `columns` the equal row that is first in `order`.

    Rows are compared in parts that fit in memory, by a hash of their words; all words are compared afterwards, so
    collisions cannot change the result.
    """
    n = len(order)
    if n <= PART_ROWS:
        return _first(columns(slice(0, n)), order)
    rank = empty(n, np.int64)
    for piece in pieces(n):
        rank[order[piece]] = np.arange(piece.start, piece.stop)
    mixed = made_of(n, lambda piece: _mixed(columns(piece)), np.uint64)
    rows = numbered(n)
    first = empty(n, np.int64)
    for part in parts([mixed, rows]):
        _decide(part, columns, rank, first)
    release(rank, rows)
    return cast(Ints, release(first))


def _decide(part: Part, columns: Columns, rank: Ints, first: Ints) -> None:
    """Set `first` of the part's rows."""
    rows = part.columns[1]
    if part.equal and (one := _all_equal(rows, columns, rank)) >= 0:
        for piece in pieces(len(rows)):
            first[rows[piece]] = one
    else:
        first[rows] = rows[_first(columns(rows), np.argsort(rank[rows]))]


def _all_equal(rows: Ints, columns: Columns, rank: Ints) -> int:
    """Return the first of the rows by rank if all of them are equal, else -1."""
    found = [own[np.argmin(rank[own])] for own in (rows[piece] for piece in pieces(len(rows)))]
    one = int(min(found, key=lambda row: int(rank[row])))
    words = columns(np.array([one]))
    for piece in pieces(len(rows)):
        if not all((column == value).all() for column, value in zip(columns(rows[piece]), words, strict=True)):
            return -1
    return one


def _mixed(columns: Sequence[Words]) -> Words:
    mixed = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        mixed = (mixed * _MIX) ^ column
    return mixed * _MIX  # so that the first bits depend on all columns


def _first(columns: Sequence[Words], order: Ints) -> Ints:
    """Return for each row the equal row that is first in `order`."""
    n = len(order)
    if not n:
        return np.zeros(0, np.int64)
    rank = np.empty(n, np.int64)
    rank[order] = np.arange(n)
    mixed = _mixed(columns)
    by = np.argsort(mixed)
    mixed = mixed[by]
    starts = np.flatnonzero(np.concatenate([[True], mixed[1:] != mixed[:-1]]))
    least = np.minimum.reduceat(rank[by], starts)
    first = np.empty(n, np.int64)
    first[by] = np.repeat(order[least], np.diff(starts, append=n))
    (repeats,) = np.nonzero(first != np.arange(n))
    if not all((column[first[repeats]] == column[repeats]).all() for column in columns):
        return _first_by_words(columns, rank)
    return first


def _first_by_words(columns: Sequence[Words], rank: Ints) -> Ints:
    """Return for each row the equal row of least rank, without hashes."""
    by = np.lexsort((rank, *columns))
    differs = np.any([column[by][1:] != column[by][:-1] for column in columns], axis=0)
    starts = np.flatnonzero(np.concatenate([[True], differs]))
    first = np.empty(len(rank), np.int64)
    first[by] = np.repeat(by[starts], np.diff(starts, append=len(rank)))
    return first


def decide_equal(kept: Ints, first: Ints, order: Ints, apart: Apart) -> None:
    """Decide on rows that are equal to one of a pair: each repeats the first kept one that it is not apart from.

    `first` is the first of all rows equal to a row, in `order`; `kept` is changed.
    """
    held: dict[int, list[int]] = {group: [] for group in np.unique(first[apart.rows]).tolist()}
    groups = np.array(sorted(held), np.int64)
    for piece in pieces(len(order)):
        own = order[piece]
        for row in own[np.isin(first[own], groups)].tolist():
            others = held[int(first[row])]
            near = np.array(others, np.int64)[~apart.has(np.full(len(others), row), np.array(others, np.int64))]
            kept[row] = near[0] if len(near) else -1
            if not len(near):
                others.append(row)
