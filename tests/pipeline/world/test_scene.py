"""Scenes: the same everywhere, and true by a margin."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.config import WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.scene import (
    CLEAR,
    EDGE,
    GAP,
    RELATIONS,
    SIZES,
    Scene,
    Vocabulary,
    dice,
    draw_scene,
    pick_share,
    relation,
    vocabulary,
)

INDICES = st.integers(min_value=0, max_value=10**8)
SEEDS = st.integers(min_value=0, max_value=2**63)


def test_scenes_are_the_same_on_every_machine() -> None:
    facts = repr([draw_scene(7, index, Vocabulary()) for index in range(200)])
    assert hashlib.blake2b(facts.encode(), digest_size=8).hexdigest() == "62da0cf60017857b"


def test_dice_promise_these_numbers() -> None:
    assert [round(dice("scene", 0, index).random(), 6) for index in range(3)] == [0.483006, 0.317045, 0.776092]


@settings(max_examples=150, deadline=None)
@given(SEEDS, INDICES)
def test_everything_that_a_scene_states_holds_by_a_margin(seed: int, index: int) -> None:
    scene = draw_scene(seed, index, Vocabulary())
    assert scene == draw_scene(seed, index, Vocabulary())
    assert 1 <= len(scene.things) <= 3
    for thing in scene.things:
        low, high = SIZES[thing.size]
        assert low <= thing.r <= high
        for coordinate in (thing.x, thing.y):
            assert thing.r + EDGE - 1e-4 <= coordinate <= 1 - thing.r - EDGE + 1e-4
            assert min(abs(coordinate - border) for border in (0.41, 0.59)) >= 0.0399
    assert len({(thing.colour, thing.shape) for thing in scene.things}) == len(scene.things)
    for a, b in itertools.combinations(scene.things, 2):
        dx, dy = abs(a.x - b.x), abs(a.y - b.y)
        assert math.hypot(dx, dy) >= a.r + b.r + GAP
        assert abs(dx - dy) >= CLEAR
        assert a.place != b.place
        assert relation(b, a) == RELATIONS[relation(a, b)]
        assert relation(a, b) != "right of" or a.x > b.x


def test_only_the_vocabulary_is_used() -> None:
    world = WorldSource(shapes=["star"], colours=["red", "blue"], textures=["plain"], min_objects=2, max_objects=2)
    scenes = [draw_scene(1, index, vocabulary(world)) for index in range(50)]
    assert all({thing.colour for thing in scene.things} == {"red", "blue"} for scene in scenes)
    assert all((thing.shape, thing.texture) == ("star", "plain") for scene in scenes for thing in scene.things)


def test_words_are_used_about_equally() -> None:
    scenes = [draw_scene(3, index, Vocabulary()) for index in range(1500)]
    for count in (1, 2, 3):
        assert 0.28 < sum(len(scene.things) == count for scene in scenes) / len(scenes) < 0.39
    shares = {"plain": 0.5, "large": 0.33, "circle": 0.2, "red": 0.125}
    things = [thing for scene in scenes for thing in scene.things]
    for word, share in shares.items():
        found = sum(word in (thing.texture, thing.size, thing.shape, thing.colour) for thing in things) / len(things)
        assert found == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(
    ("world", "field"),
    [
        (WorldSource(shapes=["blob"]), "source.world.shapes"),
        (WorldSource(colours=[]), "source.world.colours"),
        (WorldSource(textures=["plain", "plain"]), "source.world.textures"),
        (WorldSource(min_objects=3, max_objects=2), "source.world.min_objects"),
        (WorldSource(shapes=["star"], colours=["red"]), "source.world"),
    ],
)
def test_a_world_that_cannot_be_drawn_is_the_recipes_fault(world: WorldSource, field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        vocabulary(world)
    assert caught.value.field == field


def test_shares_leave_a_remainder() -> None:
    drawn = [pick_share(dice("shares", index), {"a": 0.2, "b": 0.3}) for index in range(2000)]
    assert drawn.count("a") / 2000 == pytest.approx(0.2, abs=0.03)
    assert drawn.count(None) / 2000 == pytest.approx(0.5, abs=0.04)


def test_things_are_listed_from_left_to_right() -> None:
    scenes: list[Scene] = [draw_scene(0, index, Vocabulary()) for index in range(100)]
    for scene in scenes:
        columns = [thing.cell[1] for thing in scene.things]
        assert columns == sorted(columns)
