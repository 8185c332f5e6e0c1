"""Rows too many for memory → parts that fit, by the values of a column

A part holds all rows between two values, so parts are sorted, grouped or compared one by one. The values are quantiles
of a sample, so that parts are of about equal size; one that many rows share has a part of its own. How rows are divided
changes no outcome.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from capstan.pipeline.select.arrays.large_arrays import Array, Ints, empty, pieces, release

PART_ROWS: Final = 1 << 20  # rows that are sorted in memory
_MOST_PARTS: Final = 1 << 12  # into which rows are split at once
_SAMPLED: Final = 64  # rows per part

Numbers = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Part:
    """Some rows' values by column. `equal`: all have the same value in the first one, and may be more than fit."""

    columns: list[Array]
    equal: bool = False


def parts(columns: Sequence[Array]) -> Iterator[Part]:
    """Yield all rows, in order within each part; rows with equal values in columns[0] are in one part."""
    if len(columns[0]) <= PART_ROWS:
        yield Part(list(columns))
        return
    for number, part in enumerate(split(columns, 0)):
        if number % 2:
            yield Part(part, equal=True)
        elif len(part[0]):
            yield from parts(part)


def ascending(columns: Sequence[Array], by: int = 0) -> Iterator[Array]:
    """Yield the last column of the rows sorted by columns[0], then columns[1], …; no two rows may be equal."""
    if len(columns[0]) <= PART_ROWS:
        yield columns[-1][np.lexsort(columns[::-1])]
        return
    for number, part in enumerate(split(columns, by)):
        yield from ascending(part, by + number % 2)  # in parts with an odd number, the column has one value


def first(columns: Sequence[Array], most: int) -> Iterator[Array]:
    """Yield the last column of the `most` rows that come first by columns[0], then columns[1], …"""
    for rows in ascending(columns) if most else ():
        yield rows[:most]
        most -= len(rows)
        if most <= 0:
            return


def split(columns: Sequence[Array], by: int) -> list[list[Array]]:
    """Return the rows in parts by the column `by`, in order within each part.

    Parts 1, 3, … hold the rows with one value each, parts 0, 2, … those below, between and above these values.
    """
    values = columns[by]
    bounds = _bounds(values)

    def number_of(piece: slice) -> Numbers:
        own = values[piece]
        low = np.searchsorted(bounds, own)
        return (2 * low + (bounds[np.minimum(low, len(bounds) - 1)] == own)).astype(np.uint16)

    return scattered(columns, number_of, 2 * len(bounds) + 1)


def scattered(columns: Sequence[Array | None], number_of: Callable[[slice], Numbers], count: int) -> list[list[Array]]:
    """Return the rows in `count` parts, in order within each; `number_of` returns the parts of the rows of a slice.

    A column that is None (not all may be) holds the numbers of the rows.
    """
    given = [column for column in columns if column is not None]
    rows = len(given[0])
    sizes = np.zeros(count, np.int64)
    for piece in pieces(rows):
        sizes += np.bincount(number_of(piece), minlength=count)
    ends = np.cumsum(sizes)
    free = ends - sizes  # place of the next row of each part
    made = [empty(rows, np.dtype(np.int64) if column is None else column) for column in columns]
    plain = [
        (None if column is None else np.asarray(column), np.asarray(target))
        for column, target in zip(columns, made, strict=True)
    ]
    for piece in pieces(rows):
        own = number_of(piece)
        order = np.argsort(own, kind="stable")  # a radix sort
        there = np.bincount(own, minlength=count)
        chosen = np.flatnonzero(there)
        starts = (np.cumsum(there) - there)[chosen]
        runs = [side.tolist() for side in (starts, starts + there[chosen], free[chosen], free[chosen] + there[chosen])]
        for column, target in plain:  # slices of memory maps are slow
            ordered = piece.start + order if column is None else column[piece][order]
            for start, stop, place, end in zip(*runs, strict=True):
                target[place:end] = ordered[start:stop]
        free += there
    release(*given, *made)
    bounds = [0, *ends.tolist()]
    return [[column[start:stop] for column in made] for start, stop in itertools.pairwise(bounds)]


def _bounds(values: Array) -> npt.NDArray[Any]:
    """Return values that split the rows into parts that fit, as far as they differ."""
    count = min(-(-2 * len(values) // PART_ROWS), _MOST_PARTS)
    chosen: Ints = np.linspace(0, len(values) - 1, count * _SAMPLED).astype(np.int64)
    return np.unique(np.sort(values[chosen])[_SAMPLED::_SAMPLED])
