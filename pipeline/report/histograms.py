"""Rows → histograms of sizes, caption lengths and scores, with thresholds

Failed rows have no image to measure and are left out; so are rows that were taken down. Bins follow from quantiles, so
that a few outliers do not flatten the rest. All rows are counted, or about a million of a larger dataset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import duckdb

from capstan.pipeline.dataset.parts import PARTS, part_fields
from capstan.pipeline.html import plots
from capstan.pipeline.html.axes import nice, short
from capstan.pipeline.records import KEPT, LEDGER_SCHEMA
from capstan.pipeline.report.query import SHOWN, Rows, quoted
from capstan.pipeline.report.thresholds import Threshold, canonical, thresholds

# Always shown: title, SQL, whether ratios matter more than differences.
_ALWAYS: Final = (
    ("Shorter side of the source, pixels", "least(original_width, original_height)", False),
    ("Width ÷ height of the source", "original_width / original_height", True),
    ("Source file, bytes", "bytes", True),
    ("Caption, characters", "length(caption)", False),
)
_NUMERIC: Final = ("INT", "FLOAT", "DOUBLE", "DECIMAL", "HUGEINT")
_MOST: Final = 36  # histograms
_BINS: Final = 36  # approximate number of bars
_TAIL: Final = 30  # if the 99.5th percentile exceeds this many medians, the axis is logarithmic
_QUANTILES: Final = (0.005, 0.05, 0.5, 0.95, 0.995)

_PLACES: Final = {"offset", "size", "crc32", *(field.name for field in part_fields(PARTS))}


@dataclass(frozen=True)
class Subject:
    """A numeric property of a row."""

    title: str
    sql: str
    proportional: bool
    thresholds: tuple[Threshold, ...]


@dataclass(frozen=True)
class _Spread:
    """The range of a subject's values; the quantiles are those of _QUANTILES."""

    low: float
    high: float
    quantiles: Sequence[float]
    whole: bool


def subjects(rows: Rows) -> list[Subject]:
    """Return the subjects: the fixed ones, every score column, and all else that a condition compares."""
    found = {canonical(rows.db, sql): (title, proportional) for title, sql, proportional in _ALWAYS}
    for name, kind in rows.columns.items():
        if name not in LEDGER_SCHEMA.names and name not in _PLACES and is_numeric(kind):
            found.setdefault(canonical(rows.db, quoted(name)), (name, False))
    compared = thresholds(rows.db, rows.conditions)
    for threshold in compared:
        if threshold.subject not in found and is_numeric(_type(rows, threshold.subject)):
            found[threshold.subject] = (threshold.subject, False)
    return [
        Subject(title, sql, proportional, tuple(t for t in compared if t.subject == sql))
        for sql, (title, proportional) in found.items()
    ]


def histograms(rows: Rows, counted: Sequence[Subject]) -> tuple[list[plots.Histogram], list[str]]:
    """Return a histogram per subject whose values differ, those with thresholds first, and a line per other subject."""
    drawn, notes = list[plots.Histogram](), list[str]()
    for subject in sorted(counted, key=lambda subject: not subject.thresholds)[:_MOST]:
        try:
            spread = _spread(rows, subject)
            if spread is None:
                notes.append(f"{subject.title}: no values")
            elif spread.low == spread.high:
                notes.append(f"{subject.title}: always {short(spread.low)}")
            else:
                drawn.append(_histogram(rows, subject, spread))
        except duckdb.Error as error:  # an expression of a condition may fail on some rows
            notes.append(f"{subject.title}: cannot be counted ({str(error).splitlines()[0]})")
    return drawn, notes


def value(subject: str) -> str:
    """Return SQL for a subject as a finite DOUBLE, null if it cannot be computed."""
    number = f"TRY(({subject})::DOUBLE)"
    return f"CASE WHEN isfinite({number}) THEN {number} END"


def _histogram(rows: Rows, subject: Subject, spread: _Spread) -> plots.Histogram:
    edges, logarithmic = _edges(spread, subject)
    counted, outside = _count(rows, subject, edges, logarithmic)
    marks = [plots.Mark(t.value, _label(t), "above" if t.keeps_above else "below") for t in subject.thresholds]
    low, middle, high = (short(q) for q in spread.quantiles[1:4])
    notes = [f"median {middle} · 90% within {low} – {high}"]
    if outside:
        notes.append(f"{outside:,} beyond the edges, from {short(spread.low)} to {short(spread.high)}")
    notes += [
        f"threshold {mark.label} is outside the plot" for mark in marks if not edges[0] <= mark.value <= edges[-1]
    ]
    kept, lost = [k for k, _ in counted], [n for _, n in counted]
    return plots.Histogram(subject.title, edges, kept, lost, logarithmic, spread.whole, marks, notes)


def _label(threshold: Threshold) -> str:
    return f"{threshold.condition} {threshold.operator} {short(threshold.value)}"


def _spread(rows: Rows, subject: Subject) -> _Spread | None:
    """Return the spread of a subject's values, None if there are none."""
    at = ", ".join(map(str, _QUANTILES))
    query = f"SELECT min(v), max(v), bool_and(v = floor(v)), quantile_disc(v, [{at}]) FROM ({_values(rows, subject)})"
    ((low, high, whole, quantiles),) = rows.query(query)
    return None if low is None else _Spread(low, high, quantiles, bool(whole))


def _values(rows: Rows, subject: Subject) -> str:
    """Return SQL for the subject's values `v` and whether the rows are `kept`, for rows that have an image."""
    columns = f"{value(subject.sql)} AS v, outcome = '{KEPT}' AS kept"
    return f"SELECT {columns} FROM rows WHERE {SHOWN} AND {rows.sample}"


def _edges(spread: _Spread, subject: Subject) -> tuple[list[float], bool]:
    """Return the bins' edges, and whether they are logarithmic."""
    low, _, middle, _, high = spread.quantiles
    if high <= low:
        low, high = spread.low, spread.high
    heavy = middle > 0 and low >= 0 and high > _TAIL * middle
    if heavy:
        low = max(low, 1.0 if spread.whole else middle / _TAIL)
    logarithmic = heavy or (subject.proportional and low > 0)
    for threshold in subject.thresholds:  # include near ones; a far one would leave no room for the values
        near = threshold.value > 0 and low / 4 <= threshold.value <= high * 4 if logarithmic else True
        if near and low - (high - low) <= threshold.value <= high + (high - low):
            low, high = min(low, threshold.value), max(high, threshold.value)
    if logarithmic:
        step = (math.log(high) - math.log(low)) / _BINS
        return [math.exp(math.log(low) + n * step) for n in range(_BINS)] + [high], True
    step = nice((high - low) / _BINS)
    if spread.whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9) + 1
    return [n * step if step >= 1 else n / round(1 / step) for n in range(first, last + 1)], False


def _count(
    rows: Rows, subject: Subject, edges: Sequence[float], logarithmic: bool
) -> tuple[list[tuple[int, int]], int]:
    """Return (kept, lost) rows of each bin, and the number of rows beyond the edges."""
    bins = len(edges) - 1
    low, high = edges[0], edges[-1]
    place = f"floor((v - {low!r}) / {(high - low) / bins!r} + 1e-9)"
    if logarithmic:
        place = f"floor((ln(v) - {math.log(low)!r}) / {(math.log(high) - math.log(low)) / bins!r} + 1e-9)"
    # If the last edge is itself a value, it belongs to the last bin.
    query = f"""
        SELECT CASE WHEN v < {low!r} OR v > {high!r} THEN -1 ELSE least({place}, {bins - 1}) END::INT AS bin,
               count(*) FILTER (kept), count(*)
        FROM ({_values(rows, subject)}) WHERE v IS NOT NULL GROUP BY bin"""
    found = {bin_: (kept, all_ - kept) for bin_, kept, all_ in rows.query(query)}
    return [found.get(number, (0, 0)) for number in range(bins)], sum(found.get(-1, (0, 0)))


def is_numeric(kind: str) -> bool:
    """Return whether a DuckDB type is one of numbers."""
    return (
        kind.startswith((*_NUMERIC, "BIGINT", "SMALLINT", "TINYINT", "UINT", "UBIGINT", "USMALLINT", "UTINYINT"))
        and "[" not in kind
    )


def _type(rows: Rows, sql: str) -> str:
    """Return the DuckDB type of an expression, "" if it is not valid for the rows."""
    try:
        return str(rows.db.sql(f"SELECT ({sql}) FROM rows LIMIT 0").types[0])
    except duckdb.Error:
        return ""
