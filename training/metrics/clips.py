"""Whether clips show the things, colours and moves that their prompts state: the oracle of the moving world

Frames are parsed one by one and things followed by their colour (pipeline.world.moving.oracle); nothing is learnt. What
shall be seen is read from the prompts, so that any dataset whose captions name things as the moving world's do can be
judged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.moving.captions import read
from capstan.pipeline.world.moving.oracle import FRAME_MEASURES, score_stated, watch
from capstan.training.drawing.drawer import Drawn, Kind
from capstan.training.metrics.metric import Metric, Total
from capstan.training.metrics.samples import EvalSet


class ClipOracle(Metric):
    """The mean of each measure of clips: background, colours, count, colour with shape, move, and steadiness."""

    name: ClassVar[str] = "oracle"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"clip"})

    def __init__(self, field: str) -> None:
        self.field = field
        self.sums = torch.zeros(2, len(FRAME_MEASURES), dtype=torch.float64)  # sum of the values; their number

    def check(self, eval_set: EvalSet) -> None:
        for prompt in eval_set.prompts(range(len(eval_set))):
            if not read(prompt).things:
                problem = f"oracle reads from prompts what shall be seen, and {prompt[:80]!r} names no coloured shape"
                raise RecipeError(self.field, problem, "remove oracle, or train on the moving world")

    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        self.sums.zero_()
        yield

    def seen(self, drawn: Drawn) -> np.ndarray:
        return drawn.arrays

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        """Add clips, uint8 [N, frames, H, W, 3], for the prompts `numbers`."""
        for prompt, frames in zip(eval_set.prompts(numbers), images, strict=True):
            scores = score_stated(read(prompt), watch(frames))
            values = torch.tensor([scores[name] for name in FRAME_MEASURES], dtype=torch.float64)
            self.sums += torch.stack([values.nan_to_num(), (~values.isnan()).double()])

    def result(self, total: Total) -> dict[str, float]:
        values, counts = total(self.sums.clone())
        return dict(zip(FRAME_MEASURES, (values / counts).tolist(), strict=True))
