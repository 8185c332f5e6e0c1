"""What the vision tower sees is what open_clip's own transform gives it, pixel for pixel."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capstan.recaption.preprocess import Preprocessing, read


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, (24, 40)])
def test_same_pixels_as_open_clip(mode: str, interpolation: str, size: Any) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if mode == "shortest" and size != 32 and interpolation == "bilinear":
        return  # open_clip forgets the interpolation there
    config = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": interpolation, "resize_mode": mode, "fill_color": 7}
    theirs = image_transform_v2(PreprocessCfg(size=size, **config), is_train=False)
    ours = Preprocessing.of(list(size) if isinstance(size, tuple) else size, config)
    for width, height in [(32, 32), (51, 37), (37, 51), (20, 90), (91, 20), (8, 8)]:
        file = io.BytesIO()
        noise(width, height).save(file, "PNG")
        expected = (theirs(noise(width, height)).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        found = read(file.getvalue(), ours)
        assert found.shape == (ours.height, ours.width, 3)
        np.testing.assert_array_equal(found, expected, err_msg=f"{width}×{height}")


def test_what_is_no_image_raises() -> None:
    with pytest.raises(OSError, match="cannot identify"):
        read(b"no image", Preprocessing(8, 8))
    whole = io.BytesIO()
    noise(64, 64).save(whole, "JPEG")
    with pytest.raises(OSError, match="truncated"):
        read(whole.getvalue()[:800], Preprocessing(8, 8))


def test_unknown_preprocessing_is_refused() -> None:
    with pytest.raises(ValueError, match="interpolation random is not supported"):
        Preprocessing.of(8, {"interpolation": "random"})
    with pytest.raises(ValueError, match="preprocess"):
        Preprocessing.of(8, {"resize_mode": "stretch"})
