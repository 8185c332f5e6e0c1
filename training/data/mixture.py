"""Several datasets with weights → one endless sequence of samples

    number ──Schedule──▶ (dataset, number within its own order)

The dataset of a number depends only on the weights and the seed, so that the state of a run is still one integer. Each
dataset has its own epochs. With aspect-ratio buckets a whole batch comes from one dataset.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np

from capstan.pipeline.errors import RecipeError
from capstan.training.data.bad_samples import Location
from capstan.training.data.dataset import TrainingData
from capstan.training.data.lanes import in_lanes
from capstan.training.data.order import hash64
from capstan.training.family import Sample

_LONGEST = 10_000  # longest period of the schedule; shares are rounded to it


class Schedule:
    """n → (kind, number of this kind before n), with exact shares over any range of numbers.

    Among the first n numbers each kind has n · share, with an error below one: Tijdeman's algorithm for the chairman
    assignment problem (Discrete Mathematics 32, 1980). The sequence is periodic; `seed` sets where it starts.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        counts = _whole(weights)
        self.shares = [Fraction(count, sum(counts)) for count in counts]
        self._kinds = _assign(counts)
        self._period, self._first = len(self._kinds), hash64(seed, "mixture") % len(self._kinds)
        ones = self._kinds[:, None] == np.arange(len(counts))
        self._before = np.concatenate([np.zeros((1, len(counts)), np.int64), np.cumsum(ones, axis=0)])

    def __call__(self, number: int) -> tuple[int, int]:
        kind = int(self._kinds[(number + self._first) % self._period])
        return kind, int(self.counts(number)[kind])

    def counts(self, number: int) -> np.ndarray:
        """Return the count of each kind among the first `number` (int64 [kinds])."""
        rounds, place = divmod(number + self._first, self._period)
        return self._before[-1] * rounds + self._before[place] - self._before[self._first]


def _whole(weights: Sequence[float]) -> list[int]:
    """Return the weights as integers that sum to the period: exact for short decimals, else rounded."""
    shares = [Fraction(str(weight)) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    period = min(math.lcm(*(share.denominator for share in shares)), _LONGEST)
    counts = [math.floor(share * period) for share in shares]
    lost = sorted(range(len(shares)), key=lambda kind: (counts[kind] - shares[kind] * period, kind))
    for kind in lost[: period - sum(counts)]:  # the largest remainders get the rest
        counts[kind] += 1
    if 0 in counts:
        problem = f"weight {weights[counts.index(0)]} is less than one in {_LONGEST} of all"
        raise RecipeError("train.data.datasets", problem, "increase its weight, or remove it")
    return counts


def _assign(counts: Sequence[int]) -> np.ndarray:
    """Return kinds in an order in which every prefix has its share of each (int64 [sum of counts])."""
    period, kinds = sum(counts), range(len(counts))
    if len(counts) == 1:
        return np.zeros(1, np.int64)
    slack = 2 * len(counts) - 2
    order, used = np.zeros(period, np.int64), [0] * len(counts)
    for n in range(period):
        owed = [counts[kind] * (n + 1) - period * used[kind] for kind in kinds]  # times the period
        due = [kind for kind in kinds if owed[kind] * slack >= period]
        order[n] = min(due, key=lambda kind: (Fraction(period * (slack - 1) - owed[kind] * slack, counts[kind]), kind))
        used[order[n]] += 1
    return order


class MixedData:
    """Several `TrainingData` with the interface of one. `batch` samples at a time come from one dataset.

    `whole` is the size of a step's batch if these are one of each lane: the batch is then divided lane after lane.
    """

    def __init__(
        self,
        parts: Sequence[TrainingData],
        names: Sequence[str],
        weights: Sequence[float],
        seed: int,
        batch: int = 1,
        whole: int | None = None,
    ) -> None:
        self.parts, self.names, self._batch, self._whole = parts, names, batch, whole
        self.schedule = Schedule(weights, seed)
        self.total = sum(part.total for part in parts)
        trained, held = [len(part) for part in parts], [part.total - len(part) for part in parts]
        self._ends = np.cumsum([*trained, *held])

    @property
    def layer(self) -> str | None:
        """Return the first dataset's caption layer, the one of the held-out samples that are displayed."""
        return self.parts[0].layer

    def __len__(self) -> int:
        """Return the number of training samples of all datasets."""
        return int(self._ends[len(self.parts) - 1])

    def at(self, number: int) -> Sample:
        """Return sample `number` of the endless training sequence."""
        part, number = self._part(number)
        return self.parts[part].at(number)

    def locate(self, number: int) -> Location:
        """Return where sample `number` of the training sequence is stored."""
        part, number = self._part(number)
        return self.parts[part].locate(number)

    def _part(self, number: int) -> tuple[int, int]:
        """Return the dataset of sample `number`, and its number in that dataset's own sequence."""
        if self._whole is not None:
            number = in_lanes(number, self._whole, self._whole // self._batch, self._batch)
        item, row = divmod(number, self._batch)
        part, nth = self.schedule(item)
        return part, nth * self._batch + row

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Return sample `index`, dataset after dataset; all held-out samples from `len(self)` on."""
        place = int(np.searchsorted(self._ends, index, side="right"))
        held, part = divmod(place, len(self.parts))
        within = index - (int(self._ends[place - 1]) if place else 0)
        return self.parts[part].sample(within + held * len(self.parts[part]), epoch)

    def captions(self) -> Iterator[str]:
        """Yield every caption that the blends may use, dataset after dataset."""
        return chain.from_iterable(part.captions() for part in self.parts)

    def identity(self) -> dict[str, Any]:
        """Return `TrainingData.identity` of each dataset, by name."""
        return {name: part.identity() for name, part in zip(self.names, self.parts, strict=True)}

    def progress(self, number: int) -> dict[str, float]:
        """Return the epochs of each dataset and of all, and the realised mix, after `number` samples."""
        seen = self.schedule.counts(number // self._batch) * self._batch
        facts = {"epoch": number / len(self)}
        for name, part, count in zip(self.names, self.parts, seen.tolist(), strict=True):
            facts |= {f"epoch/{name}": count / len(part), f"mix/{name}": count / max(1, number)}
        return facts
