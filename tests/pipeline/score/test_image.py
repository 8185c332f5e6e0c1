"""Image measures without a model."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from capstan.pipeline.config import ImageScore
from capstan.pipeline.score.image import ImageMeasures, border, entropy, flatness, quality, sharpness
from capstan.pipeline.score.scorer import Sample


def grey(rgb: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)


def test_a_blurred_image_is_less_sharp(noise: Callable[..., np.ndarray]) -> None:
    sharp = grey(noise(0))
    assert sharpness(cv2.GaussianBlur(sharp, (0, 0), 3)) < sharpness(sharp) / 3
    assert sharpness(np.full((50, 70), 9, np.uint8)) == 0


def test_flatness_is_the_share_of_flat_blocks(noise: Callable[..., np.ndarray]) -> None:
    luma = grey(noise(0))
    assert flatness(luma) < 0.05
    luma[:, :48] = 200
    assert flatness(luma) == pytest.approx(0.5, abs=0.05)
    assert flatness(np.zeros((3, 5), np.uint8)) == 1


@pytest.mark.parametrize("set_to", [10, 35, 50, 75, 90, 95])
def test_quality_is_read_off_the_tables(
    set_to: int, noise: Callable[..., np.ndarray], as_jpeg: Callable[..., bytes]
) -> None:
    assert quality(as_jpeg(noise(0), set_to)) == pytest.approx(set_to, abs=1.5)


def test_entropy_in_bits() -> None:
    assert entropy(np.zeros((8, 8), np.uint8)) == 0
    assert entropy(np.arange(256, dtype=np.uint8).reshape(16, 16)) == pytest.approx(8)
    assert entropy(np.array([[0, 255]] * 4, np.uint8)) == pytest.approx(1)


def test_border_is_the_share_of_flat_margins(noise: Callable[..., np.ndarray]) -> None:
    inner = grey(noise(0))
    assert border(inner) == 0
    assert border(np.pad(inner, ((32, 0), (16, 48)), constant_values=255)) == pytest.approx(
        1 - 96 * 96 / (128 * 160), abs=0.01
    )
    assert border(np.zeros((9, 9), np.uint8)) == 1


def test_all_of_it_for_a_stored_image(noise: Callable[..., np.ndarray], as_jpeg: Callable[..., bytes]) -> None:
    scorer, rgb = ImageMeasures(ImageScore()), noise(1)
    found = scorer.score([Sample("", as_jpeg(rgb, 80), rgb)])
    assert list(found) == [field.name for field in scorer.columns]
    assert found["image_quality"][0] == pytest.approx(80, abs=1)
    assert all(np.isfinite(values).all() for values in found.values())
