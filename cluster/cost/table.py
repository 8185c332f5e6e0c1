"""A plan's stages as a table for the terminal and for Markdown"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

COLUMNS: Final = {
    "stage": "stage",
    "core_hours": "core hours",
    "gpu_hours": "GPU hours",
    "hours": "hours",
    "scratch_gb": "scratch GB",
    "objects": "objects",
    "requests": "requests",
    "stored_gb": "GB stored",
    "dollars": "$",
    "basis": "basis",
}


def cells(stages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return heading and rows of the columns that any stage fills."""
    used = [name for name in COLUMNS if any(name in stage for stage in stages)]
    rows = [["" if (value := stage.get(name)) is None else _shown(value) for name in used] for stage in stages]
    return [[COLUMNS[name] for name in used], *rows]


def _shown(value: float | str) -> str:
    """Return a number with three digits, large ones in full.

    >>> _shown(0.778), _shown(15.2), _shown(198000.0), _shown("measured")
    ('0.778', '15.2', '198,000', 'measured')
    """
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines of equal columns: words to the left, numbers to the right.

    >>> aligned([["stage", "hours"], ["plan", "0.8"]])
    ['stage  hours', 'plan     0.8']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = {place for place, name in enumerate(rows[0]) if name in ("stage", "basis")}
    return [
        "  ".join(
            text.ljust(width) if place in words else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def lines(summary: Mapping[str, Any]) -> list[str]:
    """Return a plan's summary as lines: the table, the sums, then each figure and its source."""
    total = (
        f"{_shown(summary['hours'])} hours on {summary['cores']:,} cores and {summary['gpus']:,} GPUs, "
        f"${_shown(summary['dollars'])}, and ${_shown(summary['dollars_a_month'])} a month for storage"
    )
    figures = [f"  {name}: {text}" for name, text in summary["figures"].items()]
    return [f"{summary['rows']:,} rows", *aligned(cells(summary["stages"])), total, "figures:", *figures]
