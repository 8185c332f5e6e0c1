"""Axes of SVG plots: scales, ticks, grid lines, the frame, short numbers

All plots (plots.py, interval_plots.py) are drawn at the width of a phone and arranged side by side if there is room, so
that the font size stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from capstan.pipeline.html.page import Html, escape, user_text

# Size of the drawing and the margins around the plotted area, in units of about one pixel.
WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 8, 22
LETTER: Final = 6.2  # width of a letter, a safe estimate

Scale = Callable[[float], float]  # value → position


@dataclass(frozen=True)
class Axis:
    """A horizontal axis: value → x position. A single value is centred."""

    low: float
    high: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if low == high:
            return (WIDTH - RIGHT + LEFT) / 2
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return LEFT + (at - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.logarithmic else ticks(self.low, self.high, 5)


@dataclass(frozen=True)
class VerticalAxis:
    """A vertical axis: value → y position, over a range that includes the outermost ticks."""

    low: float
    high: float
    marks: Sequence[float]
    logarithmic: bool = False

    @classmethod
    def over(cls, low: float, high: float, logarithmic: bool = False) -> VerticalAxis:
        """Return the axis for values within [low, high]; `low` is above 0 if it is logarithmic."""
        marks = log_ticks(low, high) if logarithmic else ticks(low, high, 4)
        if logarithmic and len(marks) < 2:
            marks = [mark for mark in ticks(low, high, 3) if mark > 0] or marks
        return cls(min(low, marks[0]), max(high, marks[-1]), marks, logarithmic)

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(value)
        share = (at - low) / (high - low or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def rules(self) -> list[str]:
        """Return the grid lines."""
        return [rule(self(value), short(value)) for value in self.marks]


def plot(
    title: str, drawing: str, gist: str, notes: Sequence[str] = (), *, width: int = WIDTH, height: int = HEIGHT
) -> Html:
    """Return a titled plot; `gist` describes it for screen readers, `notes` are shown below."""
    lines = "".join(f"<small>{user_text(text)}</small>" for text in notes)
    label = escape(f"{title}: {gist}")
    image = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{drawing}</svg>'
    return Html(f'<div class="plot"><h3>{user_text(title)}</h3>{image}{lines}</div>')


def rule(y: float, label: str) -> str:
    """Return a horizontal grid line with its label."""
    line = f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'


def baseline(x: Scale, values: Sequence[float]) -> str:
    """Return the horizontal axis with labels at `values`."""
    y = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>']
    for value in values:
        at, anchor = x(value), "middle"
        if at + 3 * LETTER > WIDTH:
            at, anchor = float(WIDTH), "end"
        parts.append(f'<text x="{at:.1f}" y="{y + 15}" text-anchor="{anchor}">{escape(short(value))}</text>')
    return "".join(parts)


# Numbers --------------------------------------------------------------------------------------------------------------


def nice(value: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20, … (times a power of ten) that is at least `value` > 0.

    >>> nice(0.03), nice(7), nice(20)
    (0.05, 10.0, 20.0)
    """
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    step = next(step for step in (1, 2, 5, 10) if value <= step * power * (1 + 1e-9))
    return step * power if power >= 1 else step / round(1 / power)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most about `most` + 1 round values within [low, high].

    >>> ticks(0, 87, 4)
    [0.0, 50.0]
    >>> ticks(0.1, 0.42, 4)
    [0.1, 0.2, 0.3, 0.4]
    """
    step = nice((high - low or abs(low) or 1) / most)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    inverse = round(1 / step) if step < 1 else 0  # division yields 0.3, multiplication 0.30000000000000004
    return [n / inverse if inverse else n * step for n in range(first, last + 1)] or [low]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round values within [low, high], evenly spread over powers of ten.

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
    """Return a number as a short text.

    >>> [short(value) for value in (0.28, 1234, 1500000, 12, 0.0625)]
    ['0.28', '1,234', '1.5M', '12', '0.0625']
    """
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.3g}{unit}" if abs(value) < 1e15 else f"{value:.2g}"
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"
