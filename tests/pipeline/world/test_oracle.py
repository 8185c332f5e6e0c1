"""The oracle: right on drawings, robust on soft images, and at chance on unrelated ones."""

from __future__ import annotations

import io
import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from capstan.pipeline.world.oracle import MEASURES, accuracy_on_clean, aggregate, chance, parse, score
from capstan.pipeline.world.render import encode_jpeg, render
from capstan.pipeline.world.scene import Scene, Thing, Vocabulary, draw_scene

SCENES = [draw_scene(11, index, Vocabulary()) for index in range(80)]


@pytest.mark.parametrize(("size", "blur"), [(32, 0.0), (32, 0.7), (64, 0.0), (64, 1.2), (128, 0.0)])
def test_drawings_are_read(size: int, blur: float) -> None:
    accuracy = accuracy_on_clean(size, scenes=60, blur=blur)
    for name in ("background", "colours", "count", "colour_shape", "relation", "colour", "shape", "place"):
        assert accuracy[name] >= 0.98, name
    assert accuracy["size"] >= 0.93
    if size >= 64 and not blur:
        assert accuracy["texture"] >= 0.95


def test_compression_and_noise_are_tolerated() -> None:
    noise = np.random.default_rng(0)
    scores = []
    for scene in SCENES:
        soft = cv2.GaussianBlur(render(scene, 64), (0, 0), 0.8)
        noisy = np.clip(soft + noise.normal(0, 8, soft.shape), 0, 255).astype(np.uint8)
        read = Image.open(io.BytesIO(encode_jpeg(noisy, quality=50)))
        scores.append(score(scene, np.asarray(read.convert("RGB"))))
    means = aggregate(scores)
    assert all(means[name] >= 0.97 for name in MEASURES), means


def test_a_shift_of_colours_is_tolerated() -> None:
    means = aggregate([score(scene, (render(scene, 64) * 0.9 + 12).astype(np.uint8)) for scene in SCENES])
    assert means["background"] >= 0.97
    assert means["colours"] >= 0.97


def test_touching_things_are_separated_by_colour() -> None:
    things = (
        Thing("red", "circle", "large", "plain", 0.3, 0.5, 0.24),
        Thing("blue", "circle", "large", "plain", 0.72, 0.5, 0.24),
    )
    seen = parse(render(Scene(0, 0, "white", things), 64))
    assert [(thing.colour, thing.shape) for thing in seen.things] == [("red", "circle"), ("blue", "circle")]


def test_each_measure_is_sensitive_to_its_own_error() -> None:
    a = Thing("red", "circle", "large", "plain", 0.3, 0.5, 0.24)
    b = Thing("blue", "square", "small", "plain", 0.8, 0.5, 0.16)
    asked = Scene(0, 0, "white", (a, b))
    swapped = Scene(
        0,
        0,
        "white",
        (
            Thing("blue", "square", "small", "plain", 0.2, 0.5, 0.16),
            Thing("red", "circle", "large", "plain", 0.7, 0.5, 0.24),
        ),
    )
    drawn = score(asked, render(swapped, 64))
    assert drawn == {"background": 1, "colours": 1, "count": 1, "colour_shape": 1, "relation": 0}
    alone = score(asked, render(Scene(0, 0, "black", (a,)), 64))
    assert alone == {"background": 0, "colours": 0.5, "count": 0, "colour_shape": 0.5, "relation": 0}
    one = score(Scene(0, 0, "white", (a,)), render(asked, 64))
    assert one["count"] == 0
    assert math.isnan(one["relation"])


def test_two_things_of_one_colour_are_separated_by_shape() -> None:
    star = Thing("red", "star", "large", "plain", 0.3, 0.3, 0.24)
    cross = Thing("red", "cross", "small", "plain", 0.8, 0.7, 0.16)
    for things in ((star, cross), (cross, star)):
        scene = Scene(0, 0, "white", things)
        assert score(scene, render(scene, 64))["relation"] == 1


def test_chance_is_far_below_truth() -> None:
    scenes = SCENES[:80]
    level = chance(scenes)
    assert level["background"] == pytest.approx(1 / 6, abs=0.08)
    assert level["count"] == pytest.approx(1 / 3, abs=0.1)
    assert level["colour_shape"] < 0.15
    assert level["relation"] < 0.1
    blank = [np.full((64, 64, 3), 128, np.uint8)] * 80
    assert chance(scenes, blank)["colours"] == 0
    with pytest.raises(ValueError, match="two scenes"):
        chance(scenes[:1])


def test_means_skip_undefined_values() -> None:
    assert aggregate([{"relation": math.nan}, {"relation": 1.0}]) == {"relation": 1.0}
    assert all(math.isnan(value) for value in aggregate([]).values())


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.uint8, st.tuples(st.just(24), st.just(24), st.just(3))))
def test_any_pixels_are_read(image: np.ndarray) -> None:
    found = score(SCENES[0], image)
    assert all(math.isnan(value) or 0 <= value <= 1 for value in found.values())


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        parse(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="uint8"):
        parse(np.zeros((8, 8), np.uint8))
