"""Drawing: the right colours in the right places, at any size."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from capstan.pipeline.world.render import encode_jpeg, ink, outline, render
from capstan.pipeline.world.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, Vocabulary, draw_scene


@pytest.mark.parametrize("size", [16, 32, 64, 65, 257])
def test_any_size_shows_background_and_colour(size: int) -> None:
    for shape in SHAPES:
        thing = Thing("red", shape, "large", "plain", 0.3, 0.6, 0.25)
        image = render(Scene(0, 0, "navy", (thing,)), size)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        assert tuple(image[0, 0]) == tuple(image[-1, -1]) == BACKGROUNDS["navy"]
        assert tuple(image[int(0.6 * size), int(0.3 * size)]) == COLOURS["red"]


def test_drawing_covers_the_shapes_area() -> None:
    for shape in SHAPES:
        x, y = outline(shape).T
        exact = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 * 0.25**2
        scene = Scene(0, 0, "black", (Thing("yellow", shape, "large", "plain", 0.5, 0.5, 0.25),))
        for size in (32, 200):
            red = render(scene, size)[..., 0].astype(float)
            covered = ((red - BACKGROUNDS["black"][0]) / (COLOURS["yellow"][0] - BACKGROUNDS["black"][0])).mean()
            assert covered == pytest.approx(exact, rel=0.06)


def test_images_of_two_sizes_are_the_same_image() -> None:
    for index in range(20):
        scene = draw_scene(0, index, Vocabulary(textures=("plain",)))
        large, small = render(scene, 256), render(scene, 64)
        shrunk = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(shrunk - small).mean() < 1.0


def test_textures_show_colour_and_ink() -> None:
    for texture in ("striped", "dotted"):
        image = render(Scene(0, 0, "white", (Thing("blue", "square", "large", texture, 0.5, 0.5, 0.25),)), 256)
        found = {tuple(pixel) for pixel in image[100:156, 100:156].reshape(-1, 3)}
        assert COLOURS["blue"] in found
        assert tuple(int(c + 0.5) for c in ink("blue")) in found
    with pytest.raises(ValueError, match="texture"):
        render(Scene(0, 0, "white", (Thing("blue", "square", "large", "furry", 0.5, 0.5, 0.25),)), 32)
    with pytest.raises(ValueError, match="shape"):
        outline("blob")


def test_jpeg_keeps_the_image() -> None:
    image = render(draw_scene(0, 3, Vocabulary()), 64)
    read = np.asarray(Image.open(io.BytesIO(encode_jpeg(image))).convert("RGB"), np.float32)
    assert np.abs(read - image).mean() < 3
