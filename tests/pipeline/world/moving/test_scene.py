"""What is true of every clip that the world draws."""

from __future__ import annotations

import itertools
import math

import pytest

from capstan.pipeline.world.moving.captions import descriptive, heard, read, short
from capstan.pipeline.world.moving.scene import LEAST_MOVE, STILL, MovingScene, draw_moving
from capstan.pipeline.world.scene import EDGE, Vocabulary

PLAIN = Vocabulary(textures=("plain",))


def scenes(count: int = 60, *, entries: bool = False) -> list[MovingScene]:
    return [draw_moving(3, number, PLAIN, frames=16, entries=entries) for number in range(count)]


@pytest.mark.parametrize("entries", [False, True])
def test_things_never_touch_nor_leave_the_image_and_differ_in_colour(entries: bool) -> None:
    for scene in scenes(entries=entries):
        assert len({moving.thing.colour for moving in scene.things}) == len(scene.things)
        for number in range(scene.frames):
            things = scene.still(number).things
            for a, b in itertools.combinations(things, 2):
                assert math.hypot(a.x - b.x, a.y - b.y) > a.r + b.r
            for thing in things:
                assert thing.r + EDGE - 1e-3 <= min(thing.x, thing.y)
                assert max(thing.x, thing.y) <= 1 - thing.r - EDGE + 1e-3


@pytest.mark.parametrize("entries", [False, True])
def test_things_stand_still_or_move_far_and_enter_from_left_to_right(entries: bool) -> None:
    moves = set()
    for scene in scenes(entries=entries):
        assert [m.thing.x for m in scene.things] == sorted(m.thing.x for m in scene.things)
        enters = [moving.enters for moving in scene.things]
        assert all(b - a >= 5 for a, b in itertools.pairwise(enters)) if entries else not any(enters)
        for moving in scene.things:
            moves.add(moving.move)
            way = abs(moving.dx) + abs(moving.dy)
            assert way == 0 if moving.move == STILL else way >= LEAST_MOVE
            last = moving.at(scene.frames - 1, scene.frames)
            assert last is not None
            assert (last.x - moving.thing.x, last.y - moving.thing.y) == pytest.approx((moving.dx, moving.dy))
    assert len(moves) == 5


def test_a_scene_depends_on_its_number_alone_and_too_many_entries_are_refused() -> None:
    assert draw_moving(3, 5, PLAIN) == draw_moving(3, 5, PLAIN) != draw_moving(4, 5, PLAIN)
    with pytest.raises(ValueError, match="3 entries need 15 frames"):
        draw_moving(0, 0, PLAIN, frames=8, entries=True)


@pytest.mark.parametrize("entries", [False, True])
def test_captions_say_what_is_true_and_can_be_read(entries: bool) -> None:
    for scene in scenes(entries=entries):
        stated = read(descriptive(scene))
        assert (stated.background, stated.count) == (scene.background, len(scene.things))
        truth = [(m.thing.colour, m.thing.shape, m.move) for m in scene.things]
        assert [(t.colour, t.shape, t.move) for t in stated.things] == truth
        assert [(t.colour, t.shape, t.move) for t in read(short(scene)).things] == truth
        assert [(t.colour, t.shape) for t in read(heard(scene)).things] == [one[:2] for one in truth]
        assert len(descriptive(scene).split()) <= 50
