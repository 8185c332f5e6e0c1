"""The perceptual hash: near for copies of an image, far for other images."""

from __future__ import annotations

import io

import numpy as np
import pytest
from drawn import drawing, file_of, stored
from PIL import Image

from capstan.pipeline import config
from capstan.pipeline.image.phash import area_means, phash


def test_phash_is_near_for_the_same_image_and_far_for_another() -> None:
    hashes = []
    for seed in range(8):
        picture = drawing(seed)
        large = stored(file_of(picture, "png")).phash
        small = stored(file_of(picture.resize((200, 200)), "jpeg", quality=60)).phash
        scaled = stored(file_of(picture, "jpeg", quality=80), config.Image(size=128)).phash
        assert (large ^ small).bit_count() <= 6
        assert (large ^ scaled).bit_count() <= 6
        assert 0 <= large < 2**64
        hashes.append(large)
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 10


def test_phash_of_a_flat_image_is_zero() -> None:
    assert phash(np.full((50, 70, 3), 137, np.uint8)) == 0
    assert phash(np.full((33, 71, 3), (12, 201, 99), np.uint8)) == 0


@pytest.mark.parametrize("size", [(64, 96), (97, 31), (20, 33)])
@pytest.mark.parametrize("cells", [4, 32])
def test_area_means_are_exact(size: tuple[int, int], cells: int) -> None:
    """Compared with pixels repeated so often that no area cuts one."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    fine = pixels.astype(float).repeat(cells, axis=0).repeat(cells, axis=1)
    expected = fine.reshape(cells, size[0], cells, size[1], 3).mean(axis=(1, 3))
    assert np.abs(area_means(pixels, cells) - expected).max() < 1e-5


def test_large_images_do_not_overflow() -> None:
    white = np.full((2_100, 4_100, 3), 255, np.uint8)
    assert (area_means(white, 32) == 255).all()


def textured(seed: int, size: int) -> Image.Image:
    """Smooth noise of several scales: an image whose hash depends on every part of it."""
    rng = np.random.default_rng(seed)
    layers = [rng.integers(0, 256, (n, n, 3), np.uint8) for n in (5, 11, 40)]
    scaled = [np.asarray(Image.fromarray(layer).resize((size, size), Image.Resampling.BICUBIC)) for layer in layers]
    return Image.fromarray(np.mean(scaled, axis=0).astype(np.uint8))


def test_shrunk_recompressed_and_grey_copies_stay_within_the_distance_of_near_duplicates() -> None:
    """Odd sides matter: when they were cropped to even ones before averaging, some of these were 6 bits off."""
    distances = []
    for seed in range(40):
        original = textured(seed, 331)
        copies = [original.resize((side, side), Image.Resampling.LANCZOS) for side in (130, 167, 254)]
        copies.append(Image.open(io.BytesIO(file_of(original, "jpeg", quality=30))))
        copies.append(original.convert("L").convert("RGB"))
        before = phash(np.asarray(original))
        distances += [(before ^ phash(np.asarray(copy))).bit_count() for copy in copies]
    limit = config.Dedup().perceptual
    assert limit is not None
    assert max(distances) <= limit
