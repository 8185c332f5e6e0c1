"""Numbers → plots as inline SVG: bars, funnel, histograms, curves

A plotting library would be the usual choice. But the one that writes self-contained pages adds 4.7 MB of script to
each, which leaves no room for images in a report of 5 MB, and it needs a policy that allows scripts next to untrusted
captions. Bars and lines need neither: exact values are in tooltips (`<title>`), the gist is in each plot's label.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from capstan.pipeline.html.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    VerticalAxis,
    baseline,
    plot,
    rule,
    short,
    ticks,
)
from capstan.pipeline.html.page import Html, escape, percent, user_text

_LABEL: Final = 13  # height of a text line
_LINES: Final = ("first", "second", "third")

Keeps = Literal["above", "below"]


@dataclass(frozen=True)
class Mark:
    """A threshold; rows with values on its `keeps` side are kept."""

    value: float
    label: str
    keeps: Keeps


@dataclass(frozen=True)
class Histogram:
    """Counts by value of rows that are kept (`kept`) and not kept (`lost`)."""

    title: str
    edges: Sequence[float]  # [n + 1], increasing
    kept: Sequence[int]  # [n]
    lost: Sequence[int]  # [n]
    logarithmic: bool = False
    whole: bool = False  # whole numbers: a bin's last value is its upper edge minus one
    marks: Sequence[Mark] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)  # shown below


def bar(*parts: tuple[float, str]) -> Html:
    """Return a bar of shares of 1, each (share, "kept" or "lost"), from the left. The caller shows the numbers."""
    edges = itertools.accumulate((share for share, _ in parts), initial=0.0)
    rects = "".join(
        f'<rect class="{kind}" x="{100 * start:.2f}" width="{100 * share:.2f}" height="8"/>'
        for start, (share, kind) in zip(edges, parts, strict=False)
    )
    return Html(f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{rects}</svg>')


def legend(kept: str, lost: str) -> Html:
    """Return the legend of a histogram's two colours."""

    def swatch(kind: str, word: str) -> str:
        square = (
            f'<svg viewBox="0 0 10 10" aria-hidden="true"><rect class="{kind}" width="10" height="10" rx="2"/></svg>'
        )
        return f"<span>{square}{escape(word)}</span>"

    return Html(f'<p class="legend">{swatch("kept", kept)}{swatch("lost", lost)}</p>')


def steps(rows: Sequence[tuple[str, str, int, int]]) -> Html:
    """Return the funnel: (step, SQL, rows left, rows lost) as bars relative to the first step."""
    most = max((left + lost for _, _, left, lost in rows), default=0) or 1
    items = []
    for name, code, left, lost in rows:
        minus = f"−{lost:,}" if lost else ""
        sql = f"<code>{user_text(code)}</code>" if code else ""
        drawn = bar((left / most, "kept"), (lost / most, "lost"))
        items.append(
            f'<li><span>{user_text(name)}</span>{drawn}<span class="count">{left:,}</span>'
            f'<span class="share">{percent(left, most)}</span><span class="minus">{minus}</span>{sql}</li>'
        )
    return Html(f'<ol class="steps">{"".join(items)}</ol>')


def histogram(shown: Histogram) -> Html:
    """Draw a histogram with its thresholds; the side that a threshold rejects is shaded."""
    axis = Axis(shown.edges[0], shown.edges[-1], shown.logarithmic)
    most = max((k + n for k, n in zip(shown.kept, shown.lost, strict=True)), default=0) or 1
    marks = [mark for mark in shown.marks if axis.low <= mark.value <= axis.high]
    top = TOP + _LABEL * len(marks)
    parts = [_rules(most, top), *(_bin(shown, axis, number, most, top) for number in range(len(shown.kept)))]
    parts += [_mark(mark, axis, TOP + _LABEL * row, top) for row, mark in enumerate(marks)]
    parts.append(baseline(axis, axis.ticks()))
    return plot(shown.title, "".join(parts), _gist(shown), shown.notes)


def curves(
    title: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x: str = "step",
    *,
    logarithmic: bool = False,
    kinds: Sequence[str] = _LINES,
    note: str | None = None,
) -> Html:
    """Draw up to three named lines, each (x, y), in one plot; `logarithmic` leaves out values that are not positive.

    `kinds` are the lines' styles: first, second or third. `note` replaces the range of x below the plot.
    """

    def drawn(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not logarithmic)

    points = [(a, b) for xs, ys in lines.values() for a, b in zip(xs, ys, strict=True) if drawn(b)]
    if not points:
        return plot(title, "", "no values", ["no values"])
    low, high = min(b for _, b in points), max(b for _, b in points)
    across = Axis(min(a for a, _ in points), max(a for a, _ in points))
    y = VerticalAxis.over(low, high if high > low else low + (low if logarithmic else 1), logarithmic)
    parts = y.rules()
    for kind, (name, (xs, ys)) in zip(kinds, lines.items(), strict=False):
        path = " ".join(f"{across(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True) if drawn(b))
        parts.append(f'<polyline class="line {kind}" points="{path}"><title>{escape(name)}</title></polyline>')
    parts.append(baseline(across, across.ticks()))
    ends = [f"{name}: from {short(ys[0])} to {short(ys[-1])}" for name, (_, ys) in lines.items() if len(ys)]
    return plot(
        title, "".join(parts), "; ".join(ends), [f"{'; '.join(ends)}, {note or f'over {short(across.high)} {x}s'}"]
    )


# Parts ----------------------------------------------------------------------------------------------------------------


def _gist(shown: Histogram) -> str:
    kept, lost = sum(shown.kept), sum(shown.lost)
    marks = "".join(f"; threshold {mark.label}" for mark in shown.marks)
    span = f"from {short(shown.edges[0])} to {short(shown.edges[-1])}"
    return f"histogram of {kept + lost:,} rows {span}, {kept:,} of them kept{marks}"


def _bin(shown: Histogram, axis: Axis, number: int, most: int, top: int) -> str:
    kept, lost = shown.kept[number], shown.lost[number]
    if not kept + lost:
        return ""
    low, high = shown.edges[number], shown.edges[number + 1]
    left, width = axis(low), axis(high) - axis(low)
    gap = min(1.0, width / 4)
    unit = (HEIGHT - BOTTOM - top) / most
    upper = max((kept + lost) * unit, 0.7)  # keeps a single row visible
    rects = []
    for kind, height, below in (("lost", upper - kept * unit, kept * unit), ("kept", kept * unit, 0.0)):
        if height > 0.01:
            y = HEIGHT - BOTTOM - below - height
            rects.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{y:.1f}" width="{width - gap:.1f}" height="{height:.1f}"/>'
            )
    last = high - 1 if shown.whole else high
    value_range = short(low) if shown.whole and last <= low else f"{short(low)} – {short(last)}"
    title = f"{value_range}: {kept + lost:,} rows, {kept:,} kept ({percent(kept, kept + lost)})"
    hit = f'<rect class="hit" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{HEIGHT - BOTTOM - top}"/>'
    return f"<g><title>{escape(title)}</title>{hit}{''.join(rects)}</g>"


def _mark(mark: Mark, axis: Axis, y: int, top: int) -> str:
    x, room = axis(mark.value), len(mark.label) * LETTER
    left = x + 4 + room > WIDTH  # side of the label; one that fits on neither side starts at the edge
    at, anchor = (x - 4, "end") if left and x - 4 - room > 0 else (min(x + 4, max(WIDTH - room, 0)), "start")
    start, end = (LEFT, x) if mark.keeps == "above" else (x, WIDTH - RIGHT)
    shade = (
        f'<rect class="shade" x="{start:.1f}" y="{top}" width="{end - start:.1f}" height="{HEIGHT - BOTTOM - top}"/>'
    )
    line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 2}" y2="{HEIGHT - BOTTOM}"/>'
    return (
        f'{shade}{line}<text class="marked" x="{at:.1f}" y="{y + 9}" text-anchor="{anchor}">{escape(mark.label)}</text>'
    )


def _rules(most: int, top: int) -> str:
    unit = (HEIGHT - BOTTOM - top) / most
    return "".join(rule(HEIGHT - BOTTOM - value * unit, short(value)) for value in ticks(0, most, 4)[1:])
