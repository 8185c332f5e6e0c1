"""Selection steps that compare rows: at_most per value, balance, top share.

Each step removes rows from those that all earlier steps left. The result depends on the rows alone: ties go to the
earlier batch, then to the smaller key, which is the order of the rows. `at_most` and `balance` prefer earlier batches
above all else, so that new rows displace no packed sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from capstan.pipeline.config import Condition
from capstan.pipeline.select.conditions import PASSED, QueryResult

Ints = npt.NDArray[np.int64]


def sample(conditions: Sequence[Condition], found: QueryResult, batch: Ints) -> npt.NDArray[np.int16]:
    """Return the step of each row: `found.step`, updated by the sampling steps. `batch` holds each row's batch."""
    step = found.step.copy()
    for number, condition in enumerate(conditions, 1):
        if condition.where is not None or condition.review is not None:
            continue
        (left,) = np.nonzero((step == PASSED) | (step > number))
        groups = found.groups[number][left] if number in found.groups else np.zeros(len(left), np.uint64)
        by = found.ranks[number][left] if number in found.ranks else None
        step[left[~_kept(condition, groups, by, batch[left])]] = number
    return step


def _kept(
    condition: Condition, groups: npt.NDArray[np.uint64], by: npt.NDArray[np.float64] | None, batch: Ints
) -> npt.NDArray[np.bool_]:
    if condition.top is not None:
        assert by is not None
        return best(groups, by, condition.top)
    if condition.at_most is not None:
        return first_of_each(groups, by, batch, condition.at_most)
    sizes = np.unique(groups, return_counts=True)[1]
    return first_of_each(groups, by, batch, max(condition.at_least, int(sizes.min(initial=len(groups)))))


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
