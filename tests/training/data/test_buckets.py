"""Aspect-ratio buckets: sizes of one area, the nearest proportions, and images cut to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from capstan.pipeline.errors import RecipeError
from capstan.training.config import Buckets
from capstan.training.data.buckets import assign, check_sizes, nearest_square, sizes_of
from capstan.training.data.transforms import batch_of, conditions_of, cut
from capstan.training.family import Sample


def test_generated_sizes_have_about_one_area_and_are_symmetric() -> None:
    sizes = sizes_of(Buckets(size=512, step=64, ratio=2.0))
    assert (512, 512) in sizes
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert 0.75 * 512**2 < width * height <= 512**2
        assert 1 / 2 <= width / height <= 2
    ratios = [width / height for width, height in sizes]
    assert ratios == sorted(set(ratios))


def test_images_go_to_the_nearest_proportions() -> None:
    sizes = sizes_of(Buckets(size=512))
    random = np.random.default_rng(0)
    widths, heights = random.integers(50, 5000, (2, 2000))
    ratios = np.log([width / height for width, height in sizes])
    distance = np.abs(np.log(widths / heights)[:, None] - ratios)
    chosen = assign(widths, heights, sizes)
    assert (distance[np.arange(2000), chosen] <= distance.min(1) + 1e-12).all()
    assert sizes[assign(np.array([0]), np.array([0]), sizes)[0]] == (512, 512)


def test_the_square_of_some_buckets_is_as_large_as_the_largest() -> None:
    for side in (256, 512, 1024):
        assert nearest_square(sizes_of(Buckets(size=side, step=64, ratio=3.0)), 64) == side
    assert nearest_square([(32, 128), (32, 32)], 32) == 64
    assert nearest_square([(704, 352), (352, 704)], 16) == 496  # √(704 · 352) = 497.8
    assert nearest_square([(16, 64)], 16) == 32


def test_sizes_that_a_model_cannot_take_are_refused() -> None:
    check_sizes(Buckets(size=512), 64)
    check_sizes(None, 64)
    with pytest.raises(RecipeError, match=r"train\.data\.buckets: a bucket of 12 × 16 pixels does not divide by 8"):
        check_sizes(Buckets(sizes=[(16, 16), (12, 16)]), 8)


def sample(width: int, height: int, seed: int = 1, **more) -> Sample:
    """An image whose red is the column, and whose green is the row, in parts of 250."""
    x, y = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    jpeg = simplejpeg.encode_jpeg(np.stack([x, y, 0 * x], -1).astype(np.uint8), quality=100, colorsubsampling="444")
    original = {"original_width": 2 * width, "original_height": 2 * height, **more}
    return Sample(f"{seed}", jpeg, "", "original", 0, seed, width=width, height=height, **original)


def test_images_cover_their_bucket() -> None:
    samples = [sample(900, 600, bucket=(96, 64)), sample(300, 400, bucket=(96, 64))]
    batch = batch_of(samples, 64)
    assert batch.shape == (2, 3, 64, 96)
    # The first has the bucket's proportions: all is seen. The second is as wide as the bucket: its middle is seen.
    corners = batch[:, :2, [0, -1], [0, -1]].float()
    torch.testing.assert_close(corners[0], torch.tensor([[0.0, 250], [0, 250]]), atol=6, rtol=0)
    torch.testing.assert_close(corners[1], torch.tensor([[0.0, 250], [62.5, 187.5]]), atol=6, rtol=0)


def test_a_batch_is_made_without_operations_of_torch() -> None:
    """They would start an OpenMP team for the loader's thread, and the training thread's team would sleep."""

    class Operations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    samples = [sample(900, 600, bucket=(96, 64)), sample(300, 400, bucket=(96, 64))]
    with Operations() as operations:
        batch = batch_of(samples, 64)
    assert batch.is_contiguous()
    assert operations.seen == ["aten.lift_fresh.default"]  # of from_numpy: it moves nothing


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
@pytest.mark.parametrize("flip", [False, True])
def test_conditions_say_what_was_cut(size: tuple[int, int], flip: bool) -> None:
    for seed in range(20):
        width, height = (int(side) for side in np.random.default_rng(seed).integers(100, 700, 2))
        image = sample(width, height, seed, bucket=size)
        seen = batch_of([image], 0, crop="random", flip=flip)[0].float()
        row = conditions_of([image], 0, crop="random", flip=flip)[0].tolist()
        original_height, original_width, top, left, target_height, target_width = row
        assert (original_width, original_height) == (2 * width, 2 * height)
        assert (target_width, target_height) == size
        scale = max(size[0] / width, size[1] / height)
        mirrored = flip and bool(seen[0, 0, 0] > seen[0, 0, -1])
        first = float(seen[0, :, -1 if mirrored else 0].mean()) / 250 * width * scale
        if mirrored:
            first = width * scale - size[0] - first
        assert left == pytest.approx(first, abs=3)
        assert top == pytest.approx(float(seen[1, 0].mean()) / 250 * height * scale, abs=3)


def test_what_the_build_cut_off_counts() -> None:
    image = sample(128, 128, original_width=400, original_height=200, crop_left=64)
    assert conditions_of([image], 64).tolist() == [[200, 400, 0, 32, 64, 64]]


def test_a_cut_in_the_middle_is_that_of_a_square() -> None:
    image = sample(200, 150)
    assert (cut(image.jpeg, (64, 64)) == batch_of([image], 64)[0].permute(1, 2, 0).numpy()).all()
