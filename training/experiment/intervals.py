"""Values by seed and prompt → means and differences with 95% intervals.

Pure functions. Every arm is measured with the same seeds on the same prompts, so values are a matrix [seeds, prompts],
nan where a measure is not defined. Seeds and prompts are both samples, so the bootstrap resamples each independently
(Owen 2007, "The pigeonhole bootstrap", which is conservative). Of n it draws n − 1, whose mean varies as the mean of n
does (Rao & Wu 1988); drawing n would underestimate the variance, by a third with three seeds.

With few seeds, bootstrap percentiles are as narrow as those of a normal distribution. They are widened about the mean
by the ratio of Student's t to the normal quantile (Hesterberg 2015, "What teachers should know about the bootstrap"),
with Satterthwaite's degrees of freedom: 2 if only three seeds vary, many if only the prompts do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_Z: Final = 1.959964  # 97.5% quantile of the normal distribution


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval; nan if nothing is defined; low = high = nan for a single seed and prompt."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def facts(self) -> list[float | None]:
        """Return [mean, low, high], with None for nan."""
        return [None if math.isnan(value) else round(value, 4) for value in (self.mean, self.low, self.high)]


def interval(values: Floats, draws: int = 2000, seed: int = 0) -> Interval:
    """Return the mean over all defined values [S, P], with its interval."""
    return _interval(values, _resampled(values, draws, seed))


def difference(a: Floats, b: Floats, draws: int = 2000, seed: int = 0) -> Interval:
    """Return mean(a) − mean(b), both [S, P] of the same seeds and prompts, which are resampled for both together.

    Uses only the entries defined for both: some measures are defined only for things present in an arm's image.
    """
    either = np.isnan(a) | np.isnan(b)
    a, b = np.where(either, math.nan, a), np.where(either, math.nan, b)
    spread = _resampled(a, draws, seed) - _resampled(b, draws, seed)
    middle = _mean(a) - _mean(b)
    return _stretched(middle, spread, _freedom(_centred(a) - _centred(b)))


def _interval(values: Floats, means: Floats) -> Interval:
    return _stretched(_mean(values), means, _freedom(values))


def _stretched(middle: float, means: Floats, freedom: float) -> Interval:
    if math.isnan(middle) or math.isnan(freedom):
        return Interval(middle, math.nan, math.nan)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    wider = student(freedom) / _Z
    return Interval(middle, float(middle + (low - middle) * wider), float(middle + (high - middle) * wider))


def _resampled(values: Floats, draws: int, seed: int) -> Floats:
    """Return the means [draws] under resampled seeds and prompts; the same resampling for the same shape."""
    rows, columns = _choices(values.shape, draws, seed)
    known = ~np.isnan(values)
    total = ((rows @ np.where(known, values, 0.0)) * columns).sum(1)
    weight = ((rows @ known.astype(np.float64)) * columns).sum(1)
    with np.errstate(invalid="ignore"):
        means: Floats = total / weight
    return means


@lru_cache(maxsize=8)
def _choices(shape: tuple[int, int], draws: int, seed: int) -> tuple[Floats, Floats]:
    """Return how often each seed [draws, S] and each prompt [draws, P] is drawn, n − 1 of n (1 of 1)."""
    chance = np.random.default_rng(seed)
    rows, columns = (
        chance.multinomial(max(1, count - 1), [1 / count] * count, size=draws).astype(np.float64) for count in shape
    )
    return rows, columns


def _freedom(values: Floats) -> float:
    """Return Satterthwaite's degrees of freedom of the mean, from the variances of seed means and prompt means."""
    parts = []
    for axis, count in ((1, values.shape[0]), (0, values.shape[1])):
        known = (~np.isnan(values)).sum(axis)
        means = np.nansum(values, axis)[known > 0] / known[known > 0]
        if count > 1 and len(means) > 1:
            parts.append((float(means.var(ddof=1)) / len(means), len(means) - 1))
    if not parts:
        return math.nan
    whole = sum(part for part, _ in parts)
    return 1e6 if whole == 0 else max(1.0, whole**2 / sum(part**2 / freedom for part, freedom in parts))


def _mean(values: Floats) -> float:
    known = ~np.isnan(values)
    return float(values[known].mean()) if known.any() else math.nan


def _centred(values: Floats) -> Floats:
    return values - _mean(values)


@cache
def student(freedom: float) -> float:
    """Return the 97.5% quantile of Student's t, where its density integrated from 0 reaches 0.475.

    >>> [round(student(n), 2) for n in (2, 10, 1e6)]
    [4.3, 2.23, 1.96]
    """
    n = min(freedom, 1e6)
    scale = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n * math.pi)
    x = np.linspace(0, 14, 140_001)
    density = scale * (1 + x**2 / n) ** (-(n + 1) / 2)
    reached = np.cumsum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])
    return float(x[1:][np.searchsorted(reached, 0.475)])
