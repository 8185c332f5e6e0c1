"""What a perfect model would score: a distance between two disjoint halves of the true images

A distance of true images to themselves is 0, which no model reaches. One half compared with the other shows what
chance and, for FID, bias leave of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.data.sounds import Form
from capstan.training.metrics.metric import Metric, Total
from capstan.training.metrics.samples import EvalSet


class SecondHalf(EvalSet):
    """The second half of an evaluation set, as the truth for images of the first half."""

    def __init__(self, whole: EvalSet) -> None:
        self.whole, self.count = whole, len(whole) // 2

    def __len__(self) -> int:
        return self.count

    def prompts(self, numbers: Sequence[int]) -> list[str]:
        return self.whole.prompts([self.count + number for number in numbers])

    def images(self, numbers: Sequence[int], side: int) -> np.ndarray:
        return self.whole.images([self.count + number for number in numbers], side)

    def clips(self, numbers: Sequence[int], frames: int, fps: float, side: int) -> np.ndarray:
        return self.whole.clips([self.count + number for number in numbers], frames, fps, side)

    def sounds(self, numbers: Sequence[int], form: Form) -> np.ndarray:
        return self.whole.sounds([self.count + number for number in numbers], form)


def ceiling(
    metric: Metric,
    eval_set: EvalSet,
    side: int,
    *,
    device: torch.device,
    batch: int,
    total: Total,
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """Return the values of a metric that was not used before, for true images of `side` pixels; same on all workers.

    Empty if half of the images are too few for the metric.
    """
    halves = SecondHalf(eval_set)
    mine = range(rank, len(halves), world)
    try:
        metric.check(halves)
        with metric.ready(device):
            for start in range(0, len(mine), batch):
                numbers = mine[start : start + batch]
                metric.add(halves, numbers, metric.of_truth(eval_set, numbers, side))
            values = metric.result(total)
    except RecipeError:
        return {}
    return {name: value for name, value in values.items() if not math.isnan(value)}
