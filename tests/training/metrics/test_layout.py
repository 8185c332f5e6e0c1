"""Scenes compared with the true things, by labels, attributes and boxes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from capstan.pipeline.config import WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.training.metrics.layout import MEASURES, LayoutScore, score
from capstan.training.metrics.samples import EvalSet, Scenes


def thing(label: str, x: float, y: float, **attributes: str) -> dict[str, Any]:
    return {"label": label, "box": [x - 0.1, y - 0.1, x + 0.1, y + 0.1], **attributes}


TRUE = [thing("circle", 0.2, 0.2, colour="red"), thing("circle", 0.8, 0.3, colour="blue")]


def test_the_truth_scores_one() -> None:
    assert score(TRUE, TRUE[::-1]) == dict.fromkeys(MEASURES, 1.0)


@pytest.mark.parametrize(
    ("drawn", "wrong"),
    [
        ([], {"count": 0, "labels": 0, "attributes": 0, "place": 0, "relation": 0, "overlap": 0}),
        ([TRUE[0]], {"count": 0, "labels": 0.5, "attributes": 0.5, "place": 0.5, "relation": 0, "overlap": 0.5}),
        (
            [TRUE[0], thing("square", 0.8, 0.3)],
            {"labels": 0.5, "attributes": 0.5, "place": 0.5, "relation": 0, "overlap": 0.5},
        ),
        ([TRUE[0], thing("circle", 0.8, 0.3, colour="green")], {"attributes": 0.5}),
        ([TRUE[0], thing("circle", 0.2, 0.8, colour="blue")], {"place": 0.5, "relation": 0, "overlap": 0.5}),
    ],
)  # fmt: skip
def test_each_mistake_costs_its_measure(drawn: list[dict[str, Any]], wrong: dict[str, float]) -> None:
    assert score(TRUE, drawn) == pytest.approx(dict.fromkeys(MEASURES, 1.0) | wrong)


def test_a_scene_of_one_thing_has_no_relation() -> None:
    assert math.isnan(score(TRUE[:1], TRUE[:1])["relation"])
    assert math.isnan(score([], [])["labels"])


def test_things_are_paired_by_what_they_share() -> None:
    swapped = [thing("circle", 0.2, 0.2, colour="blue"), thing("circle", 0.8, 0.3, colour="red")]
    found = score(TRUE, swapped)
    assert (found["attributes"], found["place"], found["relation"]) == (1.0, 0.0, 0.0)


def test_only_sets_with_objects_are_judged() -> None:
    judge, scenes = LayoutScore("--measures"), Scenes(WorldSource(size=32), 4)
    judge.check(scenes)
    with judge.ready(None):  # type: ignore[arg-type]
        judge.add(scenes, range(4), judge.truth(scenes, range(4), np.zeros(0)))
        assert judge.result(lambda tensor: tensor) == {f"layout_{name}": 1.0 for name in MEASURES}

    class Bare(Scenes):
        columns = EvalSet.columns

    with pytest.raises(RecipeError, match=r"^--measures: layout compares scenes with the column objects"):
        judge.check(Bare(WorldSource(size=32), 2))
