"""Whether clips show the things, colours and moves that their prompts state: the oracle of the moving world

Frames are parsed one by one and things followed by their colour (pipeline.world.moving.oracle); nothing is learnt. What
shall be seen is read from the prompts, so that any dataset whose captions name things as the moving world's do can be
judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.moving.captions import read
from capstan.pipeline.world.moving.oracle import FRAME_MEASURES, score_stated, watch
from capstan.training.drawing.drawer import Drawn, Kind
from capstan.training.metrics.metric import Means
from capstan.training.metrics.samples import EvalSet


def check_things(eval_set: EvalSet, field: str, verb: str, world: str) -> None:
    """Raise RecipeError if a prompt does not say what shall be seen, or heard."""
    for prompt in eval_set.prompts(range(len(eval_set))):
        if not read(prompt).things:
            problem = f"oracle reads from prompts what shall {verb}, and {prompt[:80]!r} names no coloured shape"
            raise RecipeError(field, problem, f"remove oracle, or train on the {world} world")


class ClipOracle(Means):
    """The mean of each measure of clips: background, colours, count, colour with shape, move, and steadiness."""

    name: ClassVar[str] = "oracle"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"clip"})
    measures: ClassVar[Sequence[str]] = FRAME_MEASURES

    def check(self, eval_set: EvalSet) -> None:
        check_things(eval_set, self.field, "be seen", "moving")

    def seen(self, drawn: Drawn) -> np.ndarray:
        return drawn.arrays

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        """Add clips, uint8 [N, frames, H, W, 3], for the prompts `numbers`."""
        for prompt, frames in zip(eval_set.prompts(numbers), images, strict=True):
            self.count(score_stated(read(prompt), watch(frames)))
