"""The oracle of moving and sounding scenes is right about the truth, and at chance about other clips."""

from __future__ import annotations

import numpy as np
import pytest

from capstan.pipeline.world.moving.oracle import (
    accuracy_on_truth,
    entries_of,
    in_time,
    listen,
    score_frames,
    score_sound,
    watch,
)
from capstan.pipeline.world.moving.render import frames_of, samples_of
from capstan.pipeline.world.moving.scene import draw_moving
from capstan.pipeline.world.scene import Vocabulary

SMALL = Vocabulary(
    shapes=("circle", "square", "triangle"),
    colours=("red", "green", "blue", "yellow", "purple", "cyan"),
    textures=("plain",),
)


@pytest.mark.parametrize(("size", "vocab"), [(32, SMALL), (64, None)])
def test_it_is_right_about_the_truth_and_wrong_about_other_clips(size: int, vocab: Vocabulary | None) -> None:
    found = accuracy_on_truth(size, vocab, scenes=24)
    for name in ("frames", "sound", "both"):
        assert found[name] == dict.fromkeys(found[name], 1.0), name
    assert found["frames_chance"]["motion"] < 0.1
    assert found["frames_chance"]["colours"] < 0.5
    assert found["sound_chance"]["in_order"] < 0.1
    assert found["both_chance"]["in_time"] < 0.3


@pytest.mark.parametrize("rate", [4000, 16_000])
def test_sound_is_heard_through_noise(rate: int) -> None:
    found = accuracy_on_truth(32, SMALL, scenes=16, rate=rate, noise=0.02)["sound"]
    assert found == dict.fromkeys(found, 1.0)


def test_what_is_wrong_is_found() -> None:
    scene = next(
        s for s in (draw_moving(0, n, SMALL, frames=16, entries=True) for n in range(99)) if len(s.things) == 3
    )
    frames, samples = frames_of(scene, 32), samples_of(scene, 4000)
    backwards = score_frames(scene, watch(frames[::-1]))
    assert (backwards["colours"], backwards["colour_shape"]) == (1, 1)
    assert backwards["motion"] < 1
    assert score_frames(scene, watch(np.repeat(frames[-1:], 16, axis=0)))["steady"] < 1
    heard = listen(samples[::-1], 4000)
    assert score_sound(scene, heard)["pitch"] == 1
    assert score_sound(scene, heard)["in_order"] == 0
    assert score_sound(scene, listen(np.zeros_like(samples), 4000)) == {
        "pitch": 0.0, "pitch_rhythm": 0.0, "count": 0.0, "in_order": 0.0
    }  # fmt: skip
    shifted = np.roll(samples, 1600, axis=0)
    assert in_time(watch(frames), listen(samples, 4000), scene.fps) == 1
    assert in_time(watch(frames), listen(shifted, 4000), scene.fps) < 1
    assert np.isnan(in_time(watch(frames[:1]), listen(samples, 4000), scene.fps))


def test_a_thing_sounds_as_it_enters() -> None:
    for number in range(20):
        scene = draw_moving(1, number, SMALL, frames=16, entries=True)
        assert [frame / scene.fps for frame, _ in entries_of(scene)] == [start for _, start in entries_of(scene)]
        for moving in scene.things:
            if moving.enters:
                assert moving.at(moving.enters - 1, scene.frames) is None
            assert moving.at(moving.enters, scene.frames) is not None
