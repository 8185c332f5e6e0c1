"""Means with intervals → plots, in a page and as SVG files that stand alone.

Like plots.py they are drawn at the width of a phone and put side by side. Colours stand in the drawing itself,
and have a contrast of at least 3 on white and on a page that is dark, so that a file looks right wherever it is shown.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from capstan.pipeline.html.page import Html, escape, said
from capstan.pipeline.html.plots import short, ticks

# By place: arms keep their colours from plot to plot.
COLOURS: Final = ("#8a8f98", "#d9662b", "#3f7fe8", "#2f9e6a", "#a05fd6", "#b8860b", "#d04f8f", "#1f93ad")

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 8, 22
_ROW: Final = 22  # height of a row of `forest`
_LETTER: Final = 6.2  # width of a letter, on the safe side
_STYLE: Final = (  # of a file: a page brings its own
    "text { font: 11px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #757e8a } .title { font-weight: 600 } "
    ".rule { stroke: #8a8f98; stroke-opacity: .25 } .axis { stroke: #8a8f98 }"
)

_Scale = Callable[[float], float]  # a value → its place
Point = tuple[float, float, float, float]  # x, mean, low, high; low and high nan where there is no interval


def bands(title: str, lines: Mapping[str, Sequence[Point]], *, colours: Sequence[str] = COLOURS) -> Html:
    """Named lines over a number, each with its interval as a band; a single point is a dot with a bar."""
    points = [point for line in lines.values() for point in line if math.isfinite(point[1])]
    if not points:
        return _plot(title, _HEIGHT, "", "no values")
    low = min(min(p[1], p[2]) if math.isfinite(p[2]) else p[1] for p in points)
    high = max(max(p[1], p[3]) if math.isfinite(p[3]) else p[1] for p in points)
    if low == high:
        low, high = low - 0.5, high + 0.5
    marks = ticks(low, high, 4)
    low, high = min(low, marks[0]), max(high, marks[-1])
    first, last = min(p[0] for p in points), max(p[0] for p in points)

    def x(value: float) -> float:
        middle = (_WIDTH - _RIGHT + _LEFT) / 2
        return middle if first == last else _LEFT + (value - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low or 1) * (_HEIGHT - _BOTTOM - _TOP)

    parts = [_rule(y(mark), short(mark)) for mark in marks]
    for (name, line), colour in zip(lines.items(), itertools.cycle(colours), strict=False):
        parts.append(_band(name, [p for p in line if math.isfinite(p[1])], x, y, colour))
    parts.append(_baseline(x, sorted({p[0] for p in points})))
    ends = {name: [p[1] for p in line if math.isfinite(p[1])] for name, line in lines.items()}
    gist = "; ".join(f"{name} ends at {short(known[-1])}" for name, known in ends.items() if known)
    return _plot(title, _HEIGHT, "".join(parts), gist)


def forest(title: str, rows: Sequence[tuple[str, float, float, float]], *, width: int = _WIDTH) -> Html:
    """Differences (label, mean, low, high) as dots with their intervals, and the line of no difference."""
    rows = [row for row in rows if math.isfinite(row[1])]
    if not rows:
        return _plot(title, _ROW, "", "no values")
    left = 12 + max(len(label) for label, *_ in rows) * _LETTER
    ends = [value for _, *values in rows for value in values if math.isfinite(value)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    height = _ROW * len(rows) + _BOTTOM

    def x(value: float) -> float:
        return left + (value - low) / (high - low or 1) * (width - left - 16)

    marks = ticks(low, high if high > low else low + 1, 5)
    parts = [
        f'<line class="rule" x1="{x(m):.1f}" x2="{x(m):.1f}" y1="0" y2="{height - _BOTTOM}"/>'
        f'<text x="{x(m):.1f}" y="{height - 7}" text-anchor="middle">{escape(short(m))}</text>'
        for m in marks
    ]
    parts.append(f'<line class="axis" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{height - _BOTTOM}"/>')
    for number, (label, mean, start, stop) in enumerate(rows):
        y = _ROW * (number + 0.5)
        clear = start > 0 or stop < 0
        colour = COLOURS[2] if clear else COLOURS[0]
        bar = ""
        if math.isfinite(start):
            bar = f'<line stroke="{colour}" stroke-width="2" x1="{x(start):.1f}" x2="{x(stop):.1f}" y1="{y}" y2="{y}"/>'
        told = f"{label}: {mean:+.3f} [{start:+.3f}, {stop:+.3f}]"
        parts.append(
            f"<g><title>{escape(told)}</title>{bar}"
            f'<circle fill="{colour}" cx="{x(mean):.1f}" cy="{y}" r="3.5"/>'
            f'<text x="{left - 10:.1f}" y="{y + 4}" text-anchor="end">{escape(label)}</text></g>'
        )
    gist = "; ".join(f"{label} {mean:+.3f}" for label, mean, *_ in rows)
    return _plot(title, height, "".join(parts), gist, width)


def key(names: Iterable[str], *, colours: Sequence[str] = COLOURS) -> Html:
    """Which line is whose."""
    spans = "".join(
        f'<span><svg viewBox="0 0 10 10" aria-hidden="true"><rect fill="{colour}" width="10" height="10" rx="2"/></svg>'
        f"{escape(name)}</span>"
        for name, colour in zip(names, itertools.cycle(colours), strict=False)
    )
    return Html(f'<p class="legend">{spans}</p>')


def standalone(plots: Sequence[tuple[str, Html]], names: Sequence[str] = (), *, across: int = 2) -> bytes:
    """(title, plot) as one SVG file, so many a row, and beneath them which colour is whose."""
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
        left += 32 + len(name) * _LETTER
    total_height = below + 10 if names else height * down
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" width="{total_width}">'
    return f"{head}<style>{_STYLE}</style>{''.join(parts)}</svg>\n".encode()


# Parts ----------------------------------------------------------------------------------------------------------------


def _plot(title: str, height: int, drawing: str, gist: str, width: int = _WIDTH) -> Html:
    label = escape(f"{title}: {gist}")
    image = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{drawing}</svg>'
    return Html(f'<div class="plot"><h3>{said(title)}</h3>{image}</div>')


def _drawing(plot: Html) -> tuple[str, int, int]:
    """(what is drawn, width, height) of a plot."""
    found = re.search(r'<svg viewBox="0 0 (\d+) (\d+)"[^>]*>(.*)</svg>', plot, re.DOTALL)
    assert found is not None
    return found[3], int(found[1]), int(found[2])


def _band(name: str, line: Sequence[Point], x: _Scale, y: _Scale, colour: str) -> str:
    sure = [p for p in line if math.isfinite(p[2])]
    ahead = " ".join(f"{x(p[0]):.1f},{y(p[3]):.1f}" for p in sure)
    back = " ".join(f"{x(p[0]):.1f},{y(p[2]):.1f}" for p in reversed(sure))
    path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in line)
    parts = [f"<g><title>{escape(name)}</title>"]
    if len(sure) > 1:
        parts.append(f'<polygon fill="{colour}" fill-opacity=".16" points="{ahead} {back}"/>')
    elif sure:
        at = f'x1="{x(sure[0][0]):.1f}" x2="{x(sure[0][0]):.1f}" y1="{y(sure[0][2]):.1f}" y2="{y(sure[0][3]):.1f}"'
        parts.append(f'<line stroke="{colour}" stroke-opacity=".5" stroke-width="3" {at}/>')
    if len(line) > 1:
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
    parts += [f'<circle fill="{colour}" cx="{x(p[0]):.1f}" cy="{y(p[1]):.1f}" r="2.6"/>' for p in line]
    return "".join([*parts, "</g>"])


def _rule(y: float, label: str) -> str:
    line = f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'


def _baseline(x: _Scale, values: Sequence[float]) -> str:
    y = _HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>']
    for value in values[:: -(-len(values) // 6)]:
        anchor = "end" if x(value) + 3 * _LETTER > _WIDTH else "middle"
        parts.append(f'<text x="{x(value):.1f}" y="{y + 15}" text-anchor="{anchor}">{escape(short(value))}</text>')
    return "".join(parts)
