"""Whether composed scenes have the true things, with their attributes, at their places

Measures of a scene, each in [0, 1]; a true thing and a drawn one are a pair if their labels agree, and the pairs that
share the most attributes come first:

layout_count        whether there are as many things
layout_labels       share of the true things that have a partner
layout_attributes   share of the true things whose partner has all of their attributes
layout_place        share of the true things whose partner's centre lies in the same of 3 × 3 parts of the canvas
layout_relation     whether the first two things' partners lie the same way round: left of, right of, above or below
layout_overlap      mean overlap (intersection over union) of boxes; 0 for a thing without a partner
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import numpy as np

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.scene import relation_of, third
from capstan.training.drawing.drawer import Drawn, Kind
from capstan.training.metrics.metric import Means
from capstan.training.metrics.samples import EvalSet

Thing = Mapping[str, Any]

MEASURES: Final = ("count", "labels", "attributes", "place", "relation", "overlap")


class LayoutScore(Means):
    """The mean of each measure over the scenes for which it is defined."""

    name: ClassVar[str] = "layout"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"scene"})
    measures: ClassVar[Sequence[str]] = MEASURES
    prefix: ClassVar[str] = "layout_"

    def check(self, eval_set: EvalSet) -> None:
        if not isinstance(eval_set.columns([0])[0].get("objects"), list):
            problem = "layout compares scenes with the column objects, and the dataset has none"
            raise RecipeError(self.field, problem, "remove layout")

    def seen(self, drawn: Drawn) -> np.ndarray:
        return drawn.arrays

    def truth(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> np.ndarray:
        scenes = np.empty(len(numbers), dtype=object)
        scenes[:] = eval_set.columns(numbers)
        return scenes

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        """Add composed scenes [N], for the prompts `numbers`."""
        for true, scene in zip(eval_set.columns(numbers), images, strict=True):
            self.count(score(true["objects"], scene["objects"]))


def score(true: Sequence[Thing], drawn: Sequence[Thing]) -> dict[str, float]:
    """Return the measures of one scene; nan where the true scene has too few things for one."""
    partners = _pairs(true, drawn)
    pairs = [(thing, partner) for thing, partner in zip(true, partners, strict=True) if partner is not None]
    count = len(true) or math.nan
    related = math.nan
    if len(true) > 1:
        a, b = partners[:2]
        related = float(a is not None and b is not None and _relation(a, b) == _relation(true[0], true[1]))
    return {
        "count": float(len(true) == len(drawn)),
        "labels": len(pairs) / count,
        "attributes": sum(_agreeing(a, b) == len(_attributes(a)) for a, b in pairs) / count,
        "place": sum(_part(a) == _part(b) for a, b in pairs) / count,
        "relation": related,
        "overlap": sum(_overlap(a["box"], b["box"]) for a, b in pairs) / count,
    }


def _pairs(true: Sequence[Thing], drawn: Sequence[Thing]) -> list[Thing | None]:
    """Return each true thing's partner of the same label; of all pairs, those that agree most are made first."""
    agreeing = [
        (-_agreeing(a, b), i, j) for i, a in enumerate(true) for j, b in enumerate(drawn) if a["label"] == b["label"]
    ]
    partners: dict[int, int] = {}
    for _, i, j in sorted(agreeing):
        if i not in partners and j not in partners.values():
            partners[i] = j
    return [drawn[partners[i]] if i in partners else None for i in range(len(true))]


def _attributes(thing: Thing) -> dict[str, str]:
    return {name: value for name, value in thing.items() if name != "label" and isinstance(value, str)}


def _agreeing(true: Thing, drawn: Thing) -> int:
    return sum(drawn.get(name) == value for name, value in _attributes(true).items())


def _centre(thing: Thing) -> tuple[float, float]:
    left, top, right, bottom = thing["box"]
    return (left + right) / 2, (top + bottom) / 2


def _part(thing: Thing) -> tuple[int, int]:
    x, y = _centre(thing)
    return third(x), third(y)


def _relation(a: Thing, b: Thing) -> str:
    (ax, ay), (bx, by) = _centre(a), _centre(b)
    return relation_of(ax - bx, ay - by)


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide * high
    return wide * high / both if both > 0 else 0.0
