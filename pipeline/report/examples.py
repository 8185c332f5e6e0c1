"""Which rows are shown as examples, chosen by key: keys are hashes, so that the first of them are a random sample, and
the same one each time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import duckdb

from capstan.pipeline.records import DUPLICATE, FAILED, KEPT, REJECTED
from capstan.pipeline.report.histograms import value
from capstan.pipeline.report.query import STAGED, Row, Rows, literal
from capstan.pipeline.report.thresholds import Threshold, thresholds
from capstan.pipeline.select.near_duplicates import CONTAMINATED as _CONTAMINATED
from capstan.pipeline.select.near_duplicates import REASONS

_KEPT: Final = 24  # images of what is kept
_BY_STEP: Final = 8  # images a condition dropped, and as many that it let pass
_ALL_STEPS: Final = 160  # images of all conditions
_PAIRS: Final = 9  # duplicates of a kind
_FAILED: Final = 2  # failed rows of a reason
_KINDS: Final = 40  # failure reasons and kinds of duplicates
CONTAMINATED: Final = REASONS[_CONTAMINATED]  # repeats an evaluation image, whose name is its `detail`


@dataclass(frozen=True)
class Step:
    """A condition's examples. With `threshold`, those nearest to it on its two sides are among them."""

    name: str
    threshold: Threshold | None
    dropped: list[str]
    passed: list[str]


@dataclass(frozen=True)
class Examples:
    """Keys of rows to show, and the rows by key."""

    kept: list[str]
    steps: list[Step]
    pairs: dict[
        str, list[str]
    ]  # kind of duplicate → dropped rows; each one's `detail` is the key that was kept (contaminated: a name)
    failed: dict[str, list[str]]  # reason → rows
    rows: dict[str, Row] = field(default_factory=dict)
    values: dict[tuple[str, str], float] = field(default_factory=dict)  # (condition, key) → what its threshold looks at

    def shown(self) -> list[Row]:
        """The rows of which an image is wanted, the most wanted first."""
        keys = [*self.kept]
        for pairs in self.pairs.values():
            keys += [key for dropped in pairs for key in (dropped, self.rows[dropped].detail)]
        for step in self.steps:
            keys += step.dropped + step.passed
        return [self.rows[key] for key in dict.fromkeys(keys) if key in self.rows]


def choose(rows: Rows) -> Examples:
    """The rows to show."""
    shown = KEPT if rows.finished else STAGED
    kept = rows.keys(f"outcome = '{shown}'", _KEPT)
    steps = list(_steps(rows))
    duplicates = [reason for outcome, reason in rows.outcomes if outcome == DUPLICATE][:_KINDS]
    pairs = {kind: rows.keys("outcome = ? AND reason = ?", _PAIRS, [DUPLICATE, kind]) for kind in duplicates}
    failed = _smallest(rows, FAILED, _FAILED)
    keys = [*kept, *_flat(pairs.values()), *_flat(failed.values())]
    keys += [key for step in steps for key in step.dropped + step.passed]
    found = rows.rows(keys)
    found |= rows.rows(
        row.detail for row in [*found.values()] if row.outcome == DUPLICATE and row.reason != CONTAMINATED
    )
    values = {(step.name, key): number for step in steps for key, number in _values(rows, step)}
    return Examples(kept, steps, {k: [d for d in v if d in found] for k, v in pairs.items()}, failed, found, values)


def _steps(rows: Rows) -> Iterator[Step]:
    """The conditions that dropped rows, with examples."""
    losing = [name for name in rows.conditions if rows.outcomes.get((REJECTED, name))]
    count = max(2, min(_BY_STEP, _ALL_STEPS // max(1, 2 * len(losing))))
    asked = thresholds(rows.db, rows.conditions)
    passing = rows.keys(f"outcome = '{KEPT}'", _KEPT + count * len(losing))[_KEPT:]
    for number, name in enumerate(losing[: _ALL_STEPS // 4]):
        own = [threshold for threshold in asked if threshold.condition == name]
        if len(own) == 1 and (near := _nearest(rows, own[0], count)):
            yield Step(name, own[0], *near)
        else:
            dropped = rows.keys("outcome = ? AND reason = ?", count, [REJECTED, name])
            yield Step(name, None, dropped, passing[number * count : (number + 1) * count])


def _nearest(rows: Rows, threshold: Threshold, count: int) -> tuple[list[str], list[str]] | None:
    """Of the rows on the two sides of a threshold those nearest to it: where it pays to look."""
    order = f"abs({value(threshold.subject)} - {threshold.value!r})"
    try:
        dropped = rows.keys("outcome = ? AND reason = ?", count, [REJECTED, threshold.condition], order=order)
        passed = rows.keys("outcome = ?", count, [KEPT], order=order)
    except duckdb.Error:
        return None
    return dropped, passed


def _values(rows: Rows, step: Step) -> list[tuple[str, float]]:
    """What a step's threshold looks at, by key."""
    keys = step.dropped + step.passed
    if step.threshold is None or not keys:
        return []
    listed = ", ".join(map(literal, keys))
    found = rows.ask(f"SELECT key, {value(step.threshold.subject)} FROM rows WHERE key IN ({listed})")
    return [(key, number) for key, number in found if number is not None]


def _smallest(rows: Rows, outcome: str, count: int) -> dict[str, list[str]]:
    """Reason → its first rows by key, for one outcome."""
    reasons = {reason: n for (kind, reason), n in rows.outcomes.items() if kind == outcome}
    found: dict[str, list[str]] = {}
    for among in dict.fromkeys([rows.sample, "true"]):  # rare ones may lie outside the sample
        query = f"SELECT reason, min(key, ?) FROM rows WHERE {among} AND outcome = ? GROUP BY reason"
        found = dict(rows.ask(query, [count, outcome]))
        if all(len(found.get(reason, [])) == min(count, n) for reason, n in reasons.items()):
            break
    return {reason: found[reason] for reason in list(reasons)[:_KINDS]}


def _flat(lists: Iterable[list[str]]) -> list[str]:
    return [key for keys in lists for key in keys]
