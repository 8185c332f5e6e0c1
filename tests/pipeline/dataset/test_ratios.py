"""A histogram of aspect ratios holds every image once, squares in its middle, and is short."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.pipeline.dataset.ratios import CELLS, cells_of, ratios_of_cells, read_histograms, write_histogram

SIDES = st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 20_000)), min_size=1, max_size=50)


@given(SIDES)
def test_every_image_is_counted_once_in_the_nearest_cell(sides: list[tuple[int, int]]) -> None:
    widths, heights = np.array(sides, np.int64).T
    cells = cells_of(widths, heights)
    assert (read_histograms(["*193", write_histogram(widths, heights)])[1] == np.bincount(cells, minlength=CELLS)).all()
    for (width, height), cell in zip(sides, cells.tolist(), strict=True):
        ratio = np.log2(width / height) if width and height else 0.0
        assert abs(ratios_of_cells() - ratio).argmin() == cell


def test_squares_are_in_the_middle_and_transposed_images_in_the_mirrored_cell() -> None:
    widths, heights = np.array([512, 0, 640, 2048, 99_999]), np.array([512, 512, 480, 512, 1])
    assert cells_of(widths, heights).tolist()[:2] == [CELLS // 2] * 2
    assert (cells_of(heights, widths) == CELLS - 1 - cells_of(widths, heights)).all()


def test_a_histogram_of_ten_thousand_images_is_short() -> None:
    random = np.random.default_rng(0)
    widths, heights = random.integers(400, 1600, (2, 10_000))
    assert len(write_histogram(widths, heights)) < 700


@pytest.mark.parametrize("text", ["", "1", "*193 1", "*192", "*194", "*9999999999 1", "*-1 *194", "a *192", "* *193"])
def test_what_is_no_histogram_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="histogram"):
        read_histograms(["3 *192", text])
