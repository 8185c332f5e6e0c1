"""Means with intervals → plots, in a page and as standalone SVG files

Colours are set in the drawing itself. They have a contrast of at least 3 on white and on a dark page, so that a file
looks right wherever it is shown.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from capstan.pipeline.html.axes import (
    BOTTOM,
    LETTER,
    WIDTH,
    Axis,
    Scale,
    VerticalAxis,
    baseline,
    plot,
    short,
    ticks,
)
from capstan.pipeline.html.page import Html, escape

# Used in order, so that arms keep their colours from plot to plot.
COLOURS: Final = ("#8a8f98", "#d9662b", "#3f7fe8", "#2f9e6a", "#a05fd6", "#b8860b", "#d04f8f", "#1f93ad")

_ROW: Final = 22  # height of a row of `forest`
_STYLE: Final = (  # for standalone files; a page has its own
    "text { font: 11px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #757e8a } .title { font-weight: 600 } "
    ".rule { stroke: #8a8f98; stroke-opacity: .25 } .axis { stroke: #8a8f98 }"
)

Point = tuple[float, float, float, float]  # x, mean, low, high; low and high are nan if there is no interval


def bands(title: str, lines: Mapping[str, Sequence[Point]], *, colours: Sequence[str] = COLOURS) -> Html:
    """Draw named lines, each with its interval as a band; a single point is a dot with a bar."""
    points = [point for line in lines.values() for point in line if math.isfinite(point[1])]
    if not points:
        return plot(title, "", "no values")
    low = min(min(p[1], p[2]) if math.isfinite(p[2]) else p[1] for p in points)
    high = max(max(p[1], p[3]) if math.isfinite(p[3]) else p[1] for p in points)
    if low == high:
        low, high = low - 0.5, high + 0.5
    x, y = Axis(min(p[0] for p in points), max(p[0] for p in points)), VerticalAxis.over(low, high)
    parts = y.rules()
    for (name, line), colour in zip(lines.items(), itertools.cycle(colours), strict=False):
        parts.append(_band(name, [p for p in line if math.isfinite(p[1])], x, y, colour))
    parts.append(baseline(x, _labels(x, sorted({p[0] for p in points}))))
    ends = {name: [p[1] for p in line if math.isfinite(p[1])] for name, line in lines.items()}
    gist = "; ".join(f"{name} ends at {short(known[-1])}" for name, known in ends.items() if known)
    return plot(title, "".join(parts), gist)


def forest(title: str, rows: Sequence[tuple[str, float, float, float]], *, width: int = WIDTH) -> Html:
    """Draw differences (label, mean, low, high) as dots with their intervals, and the line of no difference."""
    rows = [row for row in rows if math.isfinite(row[1])]
    if not rows:
        return plot(title, "", "no values", height=_ROW)
    left = 12 + max(len(label) for label, *_ in rows) * LETTER
    ends = [value for _, *values in rows for value in values if math.isfinite(value)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    height = _ROW * len(rows) + BOTTOM

    def x(value: float) -> float:
        return left + (value - low) / (high - low or 1) * (width - left - 16)

    marks = ticks(low, high if high > low else low + 1, 5)
    parts = [
        f'<line class="rule" x1="{x(m):.1f}" x2="{x(m):.1f}" y1="0" y2="{height - BOTTOM}"/>'
        f'<text x="{x(m):.1f}" y="{height - 7}" text-anchor="middle">{escape(short(m))}</text>'
        for m in marks
    ]
    parts.append(f'<line class="axis" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{height - BOTTOM}"/>')
    for number, (label, mean, start, stop) in enumerate(rows):
        y = _ROW * (number + 0.5)
        clear = start > 0 or stop < 0
        colour = COLOURS[2] if clear else COLOURS[0]
        bar = ""
        if math.isfinite(start):
            bar = f'<line stroke="{colour}" stroke-width="2" x1="{x(start):.1f}" x2="{x(stop):.1f}" y1="{y}" y2="{y}"/>'
        tooltip = f"{label}: {mean:+.3f} [{start:+.3f}, {stop:+.3f}]"
        parts.append(
            f"<g><title>{escape(tooltip)}</title>{bar}"
            f'<circle fill="{colour}" cx="{x(mean):.1f}" cy="{y}" r="3.5"/>'
            f'<text x="{left - 10:.1f}" y="{y + 4}" text-anchor="end">{escape(label)}</text></g>'
        )
    gist = "; ".join(f"{label} {mean:+.3f}" for label, mean, *_ in rows)
    return plot(title, "".join(parts), gist, width=width, height=height)


def key(names: Iterable[str], *, colours: Sequence[str] = COLOURS) -> Html:
    """Return the legend."""
    spans = "".join(
        f'<span><svg viewBox="0 0 10 10" aria-hidden="true"><rect fill="{colour}" width="10" height="10" rx="2"/></svg>'
        f"{escape(name)}</span>"
        for name, colour in zip(names, itertools.cycle(colours), strict=False)
    )
    return Html(f'<p class="legend">{spans}</p>')


def standalone(plots: Sequence[tuple[str, Html]], names: Sequence[str] = (), *, across: int = 2) -> bytes:
    """Return (title, plot) pairs as one SVG file, `across` per row, with a legend of `names` below."""
    drawings = [(title, *_drawing(plot)) for title, plot in plots]
    width = max(w for _, _, w, _ in drawings)
    height = max(h for _, _, _, h in drawings) + 24
    down = -(-len(drawings) // across)
    total_width = width * min(across, len(drawings)) + 12
    parts = []
    for number, (title, inner, own_width, own_height) in enumerate(drawings):
        x, y = 6 + number % across * width, number // across * height
        parts.append(f'<text class="title" x="{x + 4}" y="{y + 15}">{escape(title)}</text>')
        parts.append(f'<svg x="{x}" y="{y + 24}" width="{own_width}" height="{own_height}">{inner}</svg>')
    left, below = 10.0, height * down + 14
    for name, colour in zip(names, itertools.cycle(COLOURS), strict=False):
        parts.append(f'<rect fill="{colour}" x="{left:.0f}" y="{below - 9}" width="10" height="10" rx="2"/>')
        parts.append(f'<text x="{left + 15:.0f}" y="{below}">{escape(name)}</text>')
        left += 32 + len(name) * LETTER
    total_height = below + 10 if names else height * down
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" width="{total_width}">'
    return f"{head}<style>{_STYLE}</style>{''.join(parts)}</svg>\n".encode()


# Parts ----------------------------------------------------------------------------------------------------------------


def _drawing(plot: Html) -> tuple[str, int, int]:
    """Return (drawing, width, height) of a plot."""
    found = re.search(r'<svg viewBox="0 0 (\d+) (\d+)"[^>]*>(.*)</svg>', plot, re.DOTALL)
    assert found is not None
    return found[3], int(found[1]), int(found[2])


def _labels(x: Axis, places: Sequence[float]) -> Sequence[float]:
    """Return the values to label: every `n`th place if the labels fit side by side, else round values."""
    chosen = places[:: -(-len(places) // 6)]
    widths = [len(short(value)) * LETTER for value in chosen]
    gaps = [x(after) - x(before) for before, after in itertools.pairwise(chosen)]
    fit = all(gap > max(pair) + LETTER for gap, pair in zip(gaps, itertools.pairwise(widths), strict=True))
    return chosen if fit else x.ticks()


def _band(name: str, line: Sequence[Point], x: Scale, y: Scale, colour: str) -> str:
    known = [p for p in line if math.isfinite(p[2])]
    ahead = " ".join(f"{x(p[0]):.1f},{y(p[3]):.1f}" for p in known)
    back = " ".join(f"{x(p[0]):.1f},{y(p[2]):.1f}" for p in reversed(known))
    path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in line)
    parts = [f"<g><title>{escape(name)}</title>"]
    if len(known) > 1:
        parts.append(f'<polygon fill="{colour}" fill-opacity=".16" points="{ahead} {back}"/>')
    elif known:
        at = f'x1="{x(known[0][0]):.1f}" x2="{x(known[0][0]):.1f}" y1="{y(known[0][2]):.1f}" y2="{y(known[0][3]):.1f}"'
        parts.append(f'<line stroke="{colour}" stroke-opacity=".5" stroke-width="3" {at}/>')
    if len(line) > 1:
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
    parts += [f'<circle fill="{colour}" cx="{x(p[0]):.1f}" cy="{y(p[1]):.1f}" r="2.6"/>' for p in line]
    return "".join([*parts, "</g>"])
