"""The perceptual hash: near for copies of an image, far for other images."""

from __future__ import annotations

import numpy as np
from drawn import drawing, file_of, stored

from capstan.pipeline import config
from capstan.pipeline.image.phash import phash


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
