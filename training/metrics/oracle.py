"""Whether images follow their prompts, by the captioned world's oracle: it measures, nothing in it is learned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world import oracle
from capstan.training.metrics.metric import Metric, Total
from capstan.training.metrics.samples import EvalSet, Scenes


class Follows(Metric):
    """Mean of each of the oracle's measures over the images for which it is defined."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.sums = torch.zeros(2, len(oracle.MEASURES), dtype=torch.float64)  # of the values, and how many

    def check(self, subjects: EvalSet) -> None:
        if not isinstance(subjects, Scenes):
            problem = "oracle knows the captioned world alone, and source.format is not world"
            raise RecipeError(self.field, problem, "leave oracle out")

    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        self.sums.zero_()
        yield

    def add(self, subjects: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        assert isinstance(subjects, Scenes)
        for number, image in zip(numbers, images, strict=True):
            scores = oracle.score(subjects.scenes[number], image)
            values = torch.tensor([scores[name] for name in oracle.MEASURES], dtype=torch.float64)
            self.sums += torch.stack([values.nan_to_num(), (~values.isnan()).double()])

    def result(self, total: Total) -> dict[str, float]:
        values, counts = total(self.sums.clone())
        return dict(zip(oracle.MEASURES, (values / counts).tolist(), strict=True))
