"""Choice of the rows that the report shows as examples

Keys are hashes, so the first rows by key are a random sample, and the same one each time.
"""

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
_BY_STEP: Final = 8  # images per condition that it dropped, and as many that it passed
_ALL_STEPS: Final = 160  # images of all conditions
_PAIRS: Final = 9  # duplicates per kind
_FAILED: Final = 2  # failed rows per reason
_KINDS: Final = 40  # failure reasons and kinds of duplicates
CONTAMINATED: Final = REASONS[_CONTAMINATED]  # repeats an evaluation image, named in `detail`


@dataclass(frozen=True)
class Step:
    """A condition's examples. With `threshold`, they are the rows nearest to it on both sides."""

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
    values: dict[tuple[str, str], float] = field(default_factory=dict)  # (condition, key) → the value it compares
    clips: dict[str, tuple[float, str]] = field(default_factory=dict)  # key → seconds and codec, of rows that are clips

    def shown(self) -> list[Row]:
        """Return the rows whose images are shown, the most important first."""
        keys = [*self.kept]
        for pairs in self.pairs.values():
            keys += [key for dropped in pairs for key in (dropped, self.rows[dropped].detail)]
        for step in self.steps:
            keys += step.dropped + step.passed
        return [self.rows[key] for key in dict.fromkeys(keys) if key in self.rows]


def choose(rows: Rows) -> Examples:
    """Choose the rows to show."""
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
    shown_pairs = {kind: [key for key in listed if key in found] for kind, listed in pairs.items()}
    return Examples(kept, steps, shown_pairs, failed, found, values, _clips(rows, found))


def _clips(rows: Rows, keys: Iterable[str]) -> dict[str, tuple[float, str]]:
    """Return key → (seconds, codec) of those of `keys` that are clips; the codec of a sound alone is "none"."""
    if not {"start_s", "end_s", "codec"} <= rows.columns.keys() or not keys:
        return {}
    listed = ", ".join(map(literal, keys))
    found = rows.query(f"SELECT key, end_s - start_s, codec FROM rows WHERE key IN ({listed}) AND end_s > start_s")
    return {key: (seconds, codec) for key, seconds, codec in found}


def _steps(rows: Rows) -> Iterator[Step]:
    """Yield the conditions that dropped rows, with examples."""
    losing = [name for name in rows.conditions if rows.outcomes.get((REJECTED, name))]
    count = max(2, min(_BY_STEP, _ALL_STEPS // max(1, 2 * len(losing))))
    compared = thresholds(rows.db, rows.conditions)
    passing = rows.keys(f"outcome = '{KEPT}'", _KEPT + count * len(losing))[_KEPT:]
    for number, name in enumerate(losing[: _ALL_STEPS // 4]):
        own = [threshold for threshold in compared if threshold.condition == name]
        if len(own) == 1 and (near := _nearest(rows, own[0], count)):
            yield Step(name, own[0], *near)
        else:
            dropped = rows.keys("outcome = ? AND reason = ?", count, [REJECTED, name])
            yield Step(name, None, dropped, passing[number * count : (number + 1) * count])


def _nearest(rows: Rows, threshold: Threshold, count: int) -> tuple[list[str], list[str]] | None:
    """Return the rows nearest to a threshold on its two sides (dropped, passed); None if they cannot be compared."""
    order = f"abs({value(threshold.subject)} - {threshold.value!r})"
    try:
        dropped = rows.keys("outcome = ? AND reason = ?", count, [REJECTED, threshold.condition], order=order)
        passed = rows.keys("outcome = ?", count, [KEPT], order=order)
    except duckdb.Error:
        return None
    return dropped, passed


def _values(rows: Rows, step: Step) -> list[tuple[str, float]]:
    """Return (key, value that the step's threshold compares)."""
    keys = step.dropped + step.passed
    if step.threshold is None or not keys:
        return []
    listed = ", ".join(map(literal, keys))
    found = rows.query(f"SELECT key, {value(step.threshold.subject)} FROM rows WHERE key IN ({listed})")
    return [(key, number) for key, number in found if number is not None]


def _smallest(rows: Rows, outcome: str, count: int) -> dict[str, list[str]]:
    """Return reason → its first rows by key, for one outcome."""
    reasons = {reason: n for (kind, reason), n in rows.outcomes.items() if kind == outcome}
    found: dict[str, list[str]] = {}
    for among in dict.fromkeys([rows.sample, "true"]):  # rare reasons may be outside the sample
        query = f"SELECT reason, min(key, ?) FROM rows WHERE {among} AND outcome = ? GROUP BY reason"
        found = dict(rows.query(query, [count, outcome]))
        if all(len(found.get(reason, [])) == min(count, n) for reason, n in reasons.items()):
            break
    return {reason: found[reason] for reason in list(reasons)[:_KINDS]}


def _flat(lists: Iterable[list[str]]) -> list[str]:
    return [key for keys in lists for key in keys]
