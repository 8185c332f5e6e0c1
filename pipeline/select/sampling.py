"""Selection steps that compare rows: at_most per value, balance, top share.

Each step removes rows from those that all earlier steps left. The result depends on the rows alone: ties go to the
earlier batch, then to the smaller key, which is the order of the rows. `at_most` and `balance` prefer earlier batches
above all else, so that new rows displace no packed sample.

Rows are compared in parts that fit in memory (arrays.partitions), groups of rows being whole. A group that does not fit
is ranked by parts of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from capstan.pipeline.config import Condition
from capstan.pipeline.select.arrays.large_arrays import (
    Array,
    Ints,
    Rows,
    count,
    filled,
    made_of,
    pieces,
    release,
    taken,
    which,
)
from capstan.pipeline.select.arrays.partitions import Part, first, parts
from capstan.pipeline.select.conditions import PASSED, QueryResult

_LAST: Final = np.uint64(2**64 - 1)


def sample(conditions: Sequence[Condition], found: QueryResult, batch: Ints) -> npt.NDArray[np.int16]:
    """Return the step of each row: `found.step`, updated by the sampling steps. `batch` holds each row's batch."""
    step = made_of(len(found.step), lambda piece: found.step[piece], np.int16)
    for number, condition in enumerate(conditions, 1):
        if condition.where is None and condition.review is None:
            _apply(number, condition, found, batch, step)
    return step


def _apply(number: int, condition: Condition, found: QueryResult, batch: Ints, step: npt.NDArray[np.int16]) -> None:
    """Set `step` of the rows that a sampling step removes."""

    def is_left(piece: Rows) -> npt.NDArray[np.bool_]:
        return np.asarray((step[piece] == PASSED) | (step[piece] > number))

    rows = which(len(step), is_left)
    groups = taken(found.groups[number], rows) if number in found.groups else filled(len(rows), 0, np.uint64)
    by = [taken(found.ranks[number], rows)] if number in found.ranks else []
    kept = filled(len(step), False, np.bool_)
    for own in _kept(condition, [groups, *by, taken(batch, rows), rows]):
        kept[own] = True
    for piece in pieces(len(step)):
        step[piece][is_left(piece) & ~kept[piece]] = number
    release(step, kept, *found.groups.values(), *found.ranks.values())


def _kept(condition: Condition, columns: list[Array]) -> Iterator[Ints]:
    """Yield the rows that a step keeps. Columns are the groups, the ranks if there are any, batches, and rows."""
    held, most = list(parts(columns)), condition.at_most or 0
    if condition.balance is not None:
        sizes = (_least(part) for part in held if len(part.columns[0]))
        most = max(condition.at_least, min(sizes, default=0))
    for part in held:
        groups, *by, batch, rows = part.columns
        if condition.top is not None:
            yield from _top(part, condition.top)
        elif part.equal:
            yield from first([batch, *(_descending(values) for values in by), rows], most)
        else:
            yield rows[first_of_each(groups, by[0] if by else None, batch, most)]


def _least(part: Part) -> int:
    """Return the size of the part's smallest group."""
    groups = part.columns[0]
    return len(groups) if part.equal else int(np.unique(groups, return_counts=True)[1].min())


def _top(part: Part, share: float) -> Iterator[Ints]:
    """Yield the rows of the top share of each group of a part."""
    groups, by, _, rows = part.columns
    if not part.equal:
        yield rows[best(groups, by, share)]
        return
    known = count(len(by), lambda piece: ~np.isnan(by[piece]))
    yield from first([_descending(by), rows], _share_of(known, share))


def _descending(by: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """Return numbers that are in the opposite order; NaN is last."""

    def number(piece: slice) -> npt.NDArray[np.uint64]:
        values = by[piece] + 0.0  # -0.0 is equal to 0.0
        bits = np.ascontiguousarray(-values).view(np.uint64)
        negative = (bits >> np.uint64(63)).astype(bool)
        ordered = np.where(negative, ~bits, bits | np.uint64(1 << 63))
        return np.where(np.isnan(values), _LAST, ordered)

    return made_of(len(by), number, np.uint64)


def _share_of(size: int, share: float) -> int:
    return int(np.ceil(np.round(size * share, 6)))  # rounded first: 0.1 × 30 is a little above 3


def first_of_each(
    groups: npt.NDArray[np.uint64], by: npt.NDArray[np.float64] | None, batch: Ints, most: int
) -> npt.NDArray[np.bool_]:
    """Return whether a row is among the first `most` of its group.

    Rows are ranked by batch, then by highest `by` (NaN last), then by their order.
    """
    order = np.argsort(groups, kind="stable") if by is None else np.lexsort((-by, batch, groups))
    place = np.empty(len(groups), np.int64)
    place[order] = _place(groups[order])
    return place < most


def best(groups: npt.NDArray[np.uint64], by: npt.NDArray[np.float64], part: float) -> npt.NDArray[np.bool_]:
    """Return whether a row is in the top share `part` of its group (rounded up) by `by`; NaN never is."""
    (known,) = np.nonzero(~np.isnan(by))
    order = known[np.lexsort((-by[known], groups[known]))]
    sorted_groups = groups[order]
    starts = np.nonzero(np.concatenate([[True], sorted_groups[1:] != sorted_groups[:-1]]))[0] if len(order) else order
    sizes = np.diff(np.append(starts, len(order)))
    most = np.ceil(np.round(sizes * part, 6)).astype(np.int64)  # rounded first: 0.1 × 30 is a little above 3
    kept = np.zeros(len(by), bool)
    kept[order] = _place(sorted_groups) < np.repeat(most, sizes)
    return kept


def _place(sorted_groups: npt.NDArray[np.uint64]) -> Ints:
    """Return the rank of each row within its group, from 0."""
    index = np.arange(len(sorted_groups))
    is_first = np.concatenate([[True], sorted_groups[1:] != sorted_groups[:-1]])[: len(index)]
    return index - np.maximum.accumulate(np.where(is_first, index, 0))
