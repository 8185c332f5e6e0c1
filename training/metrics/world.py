"""Whether images look like the captioned world, whatever was asked for: for models without prompts

parsed           share of the images in which the oracle finds as many things as scenes have
background_tv    total variation between the backgrounds of drawn and of true images: ½ Σ |p − q|
colours_tv       the same between the colours of their things
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world import oracle
from capstan.pipeline.world.scene import BACKGROUNDS, COLOURS
from capstan.training.metrics.ceiling import SecondHalf
from capstan.training.metrics.metric import Metric, Total
from capstan.training.metrics.samples import EvalSet, Scenes

_BACKGROUNDS, _COLOURS = list(BACKGROUNDS), list(COLOURS)


class WorldLikeness(Metric):
    """The share of images that parse, and distances of what they show to what true images show."""

    name: ClassVar[str] = "world"
    uses_prompts: ClassVar[bool] = False

    def __init__(self, field: str) -> None:
        self.field = field
        self.drawn, self.true = _empty(), _empty()

    def check(self, eval_set: EvalSet) -> None:
        if _scenes(eval_set) is None:
            problem = "world works only on the captioned world, and source.format is not world"
            raise RecipeError(self.field, problem, "remove world")

    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        self.drawn, self.true = _empty(), _empty()
        yield

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        scenes = _scenes(eval_set)
        assert scenes is not None
        allowed = range(scenes.world.min_objects, scenes.world.max_objects + 1)
        self.drawn += _counted(images, allowed)
        self.true += _counted(eval_set.images(numbers, images.shape[1]), allowed)

    def result(self, total: Total) -> dict[str, float]:
        drawn, true = total(self.drawn.clone()), total(self.true.clone())
        ends = 2 + len(_BACKGROUNDS)
        return {
            "parsed": float(drawn[1] / drawn[0]),
            "background_tv": _variation(drawn[2:ends], true[2:ends]),
            "colours_tv": _variation(drawn[ends:], true[ends:]),
        }


def _empty() -> torch.Tensor:
    """Return zero counts: images, those that parse, backgrounds, colours of things."""
    return torch.zeros(2 + len(_BACKGROUNDS) + len(_COLOURS), dtype=torch.float64)


def _counted(images: np.ndarray, allowed: range) -> torch.Tensor:
    counts = _empty()
    for image in images:
        seen = oracle.parse(image)
        counts[0] += 1
        counts[1] += len(seen.things) in allowed
        counts[2 + _BACKGROUNDS.index(seen.background)] += 1
        for thing in seen.things:
            counts[2 + len(_BACKGROUNDS) + _COLOURS.index(thing.colour)] += 1
    return counts


def _variation(p: torch.Tensor, q: torch.Tensor) -> float:
    """Return the total variation of two histograms; nan if one is empty."""
    return float((p / p.sum() - q / q.sum()).abs().sum() / 2)


def _scenes(eval_set: EvalSet) -> Scenes | None:
    whole = eval_set.whole if isinstance(eval_set, SecondHalf) else eval_set
    return whole if isinstance(whole, Scenes) else None
