"""Numbers → plots, drawn as SVG inside the page.

A plotting library would be the usual choice. The one that gives self-contained pages brings 4.7 MB of script into each,
which leaves no room for images in a report of 5 MB, and needs a policy that lets scripts run beside untrusted
captions. Bars and lines need neither: exact values stand in tooltips (`<title>`), the gist in each plot's label.

Plots are drawn at the width of a phone and put side by side where there is room, so that letters keep their size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from capstan.pipeline.html.page import Html, escape, percent, said

# The drawing's size and the space around what is plotted, in units that are about a pixel.
_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 8, 8, 22
_LABEL: Final = 13  # height of a line of letters
_LETTER: Final = 6.2  # width of a letter, on the safe side
_LINES: Final = ("first", "second", "third")

Keeps = Literal["above", "below"]


@dataclass(frozen=True)
class Mark:
    """A threshold: rows with values on its `keeps` side stay."""

    value: float
    label: str
    keeps: Keeps


@dataclass(frozen=True)
class Histogram:
    """Counts by value, of rows that are kept and of rows that are not."""

    title: str
    edges: Sequence[float]  # [n + 1], rising
    kept: Sequence[int]  # [n]
    lost: Sequence[int]  # [n]
    logarithmic: bool = False
    whole: bool = False  # values are whole numbers: a bin's last value is one less than its upper edge
    marks: Sequence[Mark] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)  # shown beneath


def bar(*parts: tuple[float, str]) -> Html:
    """A bar of shares of 1, each (share, "kept" or "lost"), from the left; the numbers stand beside it in words."""
    edges = itertools.accumulate((share for share, _ in parts), initial=0.0)
    rects = "".join(
        f'<rect class="{kind}" x="{100 * start:.2f}" width="{100 * share:.2f}" height="8"/>'
        for start, (share, kind) in zip(edges, parts, strict=False)
    )
    return Html(f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{rects}</svg>')


def legend(kept: str, lost: str) -> Html:
    """What the two colours of a histogram mean."""

    def swatch(kind: str, word: str) -> str:
        square = (
            f'<svg viewBox="0 0 10 10" aria-hidden="true"><rect class="{kind}" width="10" height="10" rx="2"/></svg>'
        )
        return f"<span>{square}{escape(word)}</span>"

    return Html(f'<p class="legend">{swatch("kept", kept)}{swatch("lost", lost)}</p>')


def steps(rows: Sequence[tuple[str, str, int, int]]) -> Html:
    """The funnel: (step, its SQL, rows left, rows lost by it), as bars of what went in at the top."""
    most = max((left + lost for _, _, left, lost in rows), default=0) or 1
    items = []
    for name, code, left, lost in rows:
        minus = f"−{lost:,}" if lost else ""
        sql = f"<code>{said(code)}</code>" if code else ""
        drawn = bar((left / most, "kept"), (lost / most, "lost"))
        items.append(
            f'<li><span>{said(name)}</span>{drawn}<span class="count">{left:,}</span>'
            f'<span class="share">{percent(left, most)}</span><span class="minus">{minus}</span>{sql}</li>'
        )
    return Html(f'<ol class="steps">{"".join(items)}</ol>')


def histogram(shown: Histogram) -> Html:
    """Bars with the thresholds drawn in; the side that a threshold takes away is shaded."""
    axis = _Axis(shown.edges[0], shown.edges[-1], shown.logarithmic)
    most = max((k + n for k, n in zip(shown.kept, shown.lost, strict=True)), default=0) or 1
    marks = [mark for mark in shown.marks if axis.low <= mark.value <= axis.high]
    top = _TOP + _LABEL * len(marks)
    parts = [_rules(most, top), *(_bin(shown, axis, number, most, top) for number in range(len(shown.kept)))]
    parts += [_mark(mark, axis, _TOP + _LABEL * row, top) for row, mark in enumerate(marks)]
    parts.append(_baseline(axis))
    return _plot(shown.title, "".join(parts), _gist(shown), shown.notes)


def curves(title: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str = "step") -> Html:
    """Up to three named lines, each (x, y), in one plot."""
    points = [(a, b) for xs, ys in lines.values() for a, b in zip(xs, ys, strict=True) if math.isfinite(b)]
    if not points:
        return _plot(title, "", "no values", ["no values"])
    low, high = min(b for _, b in points), max(b for _, b in points)
    marks = ticks(low, high if high > low else low + 1, 4)
    low, high = min(low, marks[0]), max(high, marks[-1])
    across = _Axis(min(a for a, _ in points), max(a for a, _ in points), logarithmic=False)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low or 1) * (_HEIGHT - _BOTTOM - _TOP)

    parts = [_rule(y(value), short(value)) for value in marks]
    for kind, (name, (xs, ys)) in zip(_LINES, lines.items(), strict=False):
        path = " ".join(f"{across(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True) if math.isfinite(b))
        parts.append(f'<polyline class="line {kind}" points="{path}"><title>{escape(name)}</title></polyline>')
    parts.append(_baseline(across))
    ends = [f"{name}: from {short(ys[0])} to {short(ys[-1])}" for name, (_, ys) in lines.items() if len(ys)]
    return _plot(title, "".join(parts), "; ".join(ends), [f"{'; '.join(ends)}, over {short(across.high)} {x}s"])


# Parts ----------------------------------------------------------------------------------------------------------------


class _Axis:
    """Values → horizontal positions."""

    def __init__(self, low: float, high: float, logarithmic: bool) -> None:
        self.low, self.high, self.logarithmic = low, high, logarithmic

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return _LEFT + (at - low) / (high - low or 1) * (_WIDTH - _LEFT - _RIGHT)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.logarithmic else ticks(self.low, self.high, 5)


def _plot(title: str, drawing: str, gist: str, notes: Sequence[str]) -> Html:
    lines = "".join(f"<small>{said(text)}</small>" for text in notes)
    image = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{title}: {gist}")}">{drawing}</svg>'
    )
    return Html(f'<div class="plot"><h3>{said(title)}</h3>{image}{lines}</div>')


def _gist(shown: Histogram) -> str:
    kept, lost = sum(shown.kept), sum(shown.lost)
    marks = "".join(f"; threshold {mark.label}" for mark in shown.marks)
    span = f"from {short(shown.edges[0])} to {short(shown.edges[-1])}"
    return f"histogram of {kept + lost:,} rows {span}, {kept:,} of them kept{marks}"


def _bin(shown: Histogram, axis: _Axis, number: int, most: int, top: int) -> str:
    kept, lost = shown.kept[number], shown.lost[number]
    if not kept + lost:
        return ""
    low, high = shown.edges[number], shown.edges[number + 1]
    left, width = axis(low), axis(high) - axis(low)
    gap = min(1.0, width / 4)
    unit = (_HEIGHT - _BOTTOM - top) / most
    upper = max((kept + lost) * unit, 0.7)  # a single row is seen, too
    rects = []
    for kind, height, below in (("lost", upper - kept * unit, kept * unit), ("kept", kept * unit, 0.0)):
        if height > 0.01:
            y = _HEIGHT - _BOTTOM - below - height
            rects.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{y:.1f}" width="{width - gap:.1f}" height="{height:.1f}"/>'
            )
    last = high - 1 if shown.whole else high
    said_range = short(low) if shown.whole and last <= low else f"{short(low)} – {short(last)}"
    title = f"{said_range}: {kept + lost:,} rows, {kept:,} kept ({percent(kept, kept + lost)})"
    hit = f'<rect class="hit" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_HEIGHT - _BOTTOM - top}"/>'
    return f"<g><title>{escape(title)}</title>{hit}{''.join(rects)}</g>"


def _mark(mark: Mark, axis: _Axis, y: int, top: int) -> str:
    x, room = axis(mark.value), len(mark.label) * _LETTER
    left = x + 4 + room > _WIDTH  # where the label stands; one that fits on neither side starts at the edge
    at, anchor = (x - 4, "end") if left and x - 4 - room > 0 else (min(x + 4, max(_WIDTH - room, 0)), "start")
    start, end = (_LEFT, x) if mark.keeps == "above" else (x, _WIDTH - _RIGHT)
    shade = (
        f'<rect class="shade" x="{start:.1f}" y="{top}" width="{end - start:.1f}" height="{_HEIGHT - _BOTTOM - top}"/>'
    )
    line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 2}" y2="{_HEIGHT - _BOTTOM}"/>'
    return (
        f'{shade}{line}<text class="marked" x="{at:.1f}" y="{y + 9}" text-anchor="{anchor}">{escape(mark.label)}</text>'
    )


def _rules(most: int, top: int) -> str:
    unit = (_HEIGHT - _BOTTOM - top) / most
    return "".join(_rule(_HEIGHT - _BOTTOM - value * unit, short(value)) for value in ticks(0, most, 4)[1:])


def _rule(y: float, label: str) -> str:
    line = f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'


def _baseline(axis: _Axis) -> str:
    y = _HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>']
    for value in axis.ticks():
        x, anchor = axis(value), "middle"
        if x + 3 * _LETTER > _WIDTH:
            x, anchor = float(_WIDTH), "end"
        parts.append(f'<text x="{x:.1f}" y="{y + 15}" text-anchor="{anchor}">{escape(short(value))}</text>')
    return "".join(parts)


# Numbers on axes ------------------------------------------------------------------------------------------------------


def nice(value: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, … (times a power of ten) that is not less than `value`, which is above 0.

    >>> nice(0.03), nice(7), nice(20)
    (0.05, 10.0, 20.0)
    """
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    step = next(step for step in (1, 2, 5, 10) if value <= step * power * (1 + 1e-9))
    return step * power if power >= 1 else step / round(1 / power)


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` + 1 round values that lie within [low, high], or just at its ends.

    >>> ticks(0, 87, 4)
    [0.0, 50.0]
    >>> ticks(0.1, 0.42, 4)
    [0.1, 0.2, 0.3, 0.4]
    """
    step = nice((high - low or abs(low) or 1) / most)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    inverse = round(1 / step) if step < 1 else 0  # dividing by it gives 0.3 where multiplying gives 0.30000000000000004
    return [n / inverse if inverse else n * step for n in range(first, last + 1)] or [low]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values within [low, high], spread evenly over powers of ten.

    >>> log_ticks(8, 5000)
    [10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**p for p in powers for d in digits if low * 0.999 <= d * 10.0**p <= high * 1.001]
        if len(found) <= most:
            break
    return found[:: -(-len(found) // most) or 1] if found else [low, high]


def short(value: float) -> str:
    """A number in few letters.

    >>> [short(value) for value in (0.28, 1234, 1500000, 12, 0.0625)]
    ['0.28', '1,234', '1.5M', '12', '0.0625']
    """
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.3g}{unit}" if abs(value) < 1e15 else f"{value:.2g}"
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"
