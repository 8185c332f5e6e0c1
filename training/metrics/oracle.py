"""Prompt following, by the captioned world's oracle, which has no learned parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world import oracle
from capstan.training.metrics.metric import Metric, Total
from capstan.training.metrics.samples import EvalSet, Scenes


class OracleScore(Metric):
    """The mean of each oracle measure over the images for which it is defined."""

    name: ClassVar[str] = "oracle"

    def __init__(self, field: str) -> None:
        self.field = field
        self.sums = torch.zeros(2, len(oracle.MEASURES), dtype=torch.float64)  # sum of the values; their number

    def check(self, eval_set: EvalSet) -> None:
        if not isinstance(eval_set, Scenes):
            problem = "oracle works only on the captioned world, and source.format is not world"
            raise RecipeError(self.field, problem, "remove oracle")

    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        self.sums.zero_()
        yield

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        assert isinstance(eval_set, Scenes)
        for number, image in zip(numbers, images, strict=True):
            scores = oracle.score(eval_set.scenes[number], image)
            values = torch.tensor([scores[name] for name in oracle.MEASURES], dtype=torch.float64)
            self.sums += torch.stack([values.nan_to_num(), (~values.isnan()).double()])

    def result(self, total: Total) -> dict[str, float]:
        values, counts = total(self.sums.clone())
        return dict(zip(oracle.MEASURES, (values / counts).tolist(), strict=True))
