"""Prompts are parsed and compared with images; only what a prompt states is required."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.pipeline.world.captions import alt, descriptive, short
from capstan.pipeline.world.prompt_score import MEASURES, judge, read
from capstan.pipeline.world.render import render
from capstan.pipeline.world.scene import Scene, Thing, Vocabulary, draw_scene

SCENES = [draw_scene(23, index, Vocabulary()) for index in range(60)]
RED = Thing("red", "circle", "large", "plain", 0.3, 0.5, 0.24)
BLUE = Thing("blue", "square", "small", "striped", 0.8, 0.5, 0.16)
SCENE = Scene(0, 0, "white", (RED, BLUE))


def test_a_description_requires_its_whole_scene_and_clean_drawings_meet_it() -> None:
    rows = [judge(read(descriptive(scene)), render(scene, 96)) for scene in SCENES]
    for name in MEASURES:
        known = [row[name] for row in rows if not math.isnan(row[name])]
        assert known, name
        assert sum(known) / len(known) >= 0.95, name
    assert all(not math.isnan(row["followed"]) for row in rows)


@pytest.mark.parametrize(
    ("prompt", "things", "bare", "count"),
    [
        ("a red circle and a blue square", [("red", "circle"), ("blue", "square")], (), None),
        ("circle and square", [], ("circle", "square"), None),
        ("drawing of star", [], ("star",), None),
        ("Yellow Triangle clip art", [("yellow", "triangle")], (), None),
        ("on a grey background there are two things: a cross, a pink star", [("pink", "star")], ("cross",), 2),
    ],
)
def test_a_prompt_is_parsed(
    prompt: str, things: list[tuple[str, str]], bare: tuple[str, ...], count: int | None
) -> None:
    wanted = read(prompt)
    assert [(thing.colour, thing.shape) for thing in wanted.things] == things
    assert (wanted.bare, wanted.count) == (bare, count)


def test_a_prompt_without_statements_requires_nothing() -> None:
    for text in ("some shapes", "IMG_0042.JPG", "BUY NOW!! Free shipping on all orders", ""):
        assert not read(text)
        assert all(math.isnan(value) for value in judge(read(text), render(SCENE, 64)).values())


def test_each_measure_is_sensitive_to_its_own_error() -> None:
    wanted = read(descriptive(SCENE))
    right = judge(wanted, render(SCENE, 128))
    assert all(value == 1 for value in right.values()), right

    def after(scene: Scene) -> set[str]:
        """Return the measures that change; `followed` always does."""
        now = judge(wanted, render(scene, 128))
        assert now["followed"] < 1
        return {name for name, value in now.items() if value != right[name]} - {"followed", "followed_strict"}

    assert after(replace(SCENE, background="navy")) == {"background"}
    assert after(replace(SCENE, things=(replace(RED, size="small", r=0.16), BLUE))) == {"size"}
    assert after(replace(SCENE, things=(RED, replace(BLUE, texture="plain")))) == {"texture"}
    turned = (replace(BLUE, x=0.2), replace(RED, x=0.7))
    assert after(replace(SCENE, things=turned)) == {"relation"}
    other = replace(SCENE, things=(RED, replace(BLUE, colour="green")))  # there is no blue square to be striped
    assert after(other) == {"colour_shape", "colour_binding", "relation", "texture"}
    other = replace(SCENE, things=(RED, replace(BLUE, shape="star")))
    assert after(other) == {"colour_shape", "shape_binding", "shapes", "relation", "texture"}
    third = Thing("green", "star", "small", "plain", 0.8, 0.15, 0.13)
    assert after(replace(SCENE, things=(RED, BLUE, third))) == {"count"}


def test_additional_things_lower_only_the_strict_measure() -> None:
    wanted = read("red circle clip art")
    alone, crowd = (judge(wanted, render(replace(SCENE, things=things), 128)) for things in ((RED,), (RED, BLUE)))
    assert alone["followed"] == crowd["followed"] == alone["followed_strict"] == 1
    assert crowd["followed_strict"] == 0.5
    assert judge(read("there are two things: a red circle"), render(SCENE, 128))["followed_strict"] == 1


def test_bindings_count_only_present_things() -> None:
    """Swapped colours: every shape and colour is present, but no pair."""
    swapped = replace(SCENE, things=(replace(RED, colour="blue"), replace(BLUE, colour="red", texture="plain")))
    found = judge(read(short(SCENE)), render(swapped, 128))
    assert (found["shapes"], found["colour_shape"], found["colour_binding"], found["shape_binding"]) == (1, 0, 0, 0)
    alone = judge(read(short(SCENE)), render(replace(SCENE, things=(RED,)), 128))
    assert (alone["shapes"], alone["colour_shape"]) == (0.5, 0.5)
    assert (alone["colour_binding"], alone["shape_binding"]) == (1, 1)


def test_a_shape_without_a_colour_may_have_any() -> None:
    found = judge(read("square and circle"), render(SCENE, 128))
    assert (found["followed"], found["shapes"]) == (1, 1)
    assert math.isnan(found["colour_shape"])
    assert judge(read("star and circle"), render(SCENE, 128))["followed"] == 0.5


@given(st.integers(0, 500))
def test_any_prompt_and_image_give_shares(index: int) -> None:
    scene = draw_scene(5, index, Vocabulary())
    found = judge(read(alt(scene)), np.full((24, 24, 3), index % 256, np.uint8))
    assert tuple(found) == MEASURES
    assert all(math.isnan(value) or 0 <= value <= 1 for value in found.values())
