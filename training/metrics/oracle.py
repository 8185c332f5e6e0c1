"""Prompt following, by the captioned world's oracle, which has no learned parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world import oracle
from capstan.training.metrics.metric import Means
from capstan.training.metrics.samples import EvalSet, Scenes


class OracleScore(Means):
    """The mean of each oracle measure over the images for which it is defined."""

    name: ClassVar[str] = "oracle"
    measures: ClassVar[Sequence[str]] = oracle.MEASURES

    def check(self, eval_set: EvalSet) -> None:
        if not isinstance(eval_set, Scenes):
            problem = "oracle works only on the captioned world, and source.format is not world"
            raise RecipeError(self.field, problem, "remove oracle")

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        assert isinstance(eval_set, Scenes)
        for number, image in zip(numbers, images, strict=True):
            self.count(oracle.score(eval_set.scenes[number], image))
