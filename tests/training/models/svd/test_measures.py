"""Measures of continued clips: right on clips that are right, and at chance on those of other images."""

from __future__ import annotations

import numpy as np
import pytest

from capstan.pipeline.world.moving.render import frames_of
from capstan.pipeline.world.moving.scene import draw_moving
from capstan.pipeline.world.scene import Vocabulary
from capstan.training.models.svd.measures import first_frame, last_colours, moved, spearman

WORLD = Vocabulary(textures=("plain",), shapes=("circle", "square"), max_objects=2)


def test_true_clips_keep_their_first_frame_and_colours() -> None:
    clips = np.stack([frames_of(draw_moving(0, index, WORLD, frames=6, fps=8), 32) for index in range(24)])
    kept = first_frame(clips, clips[:, 0])
    assert kept["value"] > 90
    assert kept["chance"] < 25
    colours = last_colours(clips, clips[:, 0])
    assert colours["value"] == 1
    assert colours["chance"] < 0.5
    frozen = np.repeat(clips[:, :1], 6, axis=1)
    both = np.concatenate([frozen, clips])
    assert moved(both, [0] * 24 + [255] * 24)["value"] > 0.5
    assert np.isnan(moved(frozen, [0] * 12 + [255] * 12)["value"])


def test_rank_correlation_has_mean_ranks_of_equal_values() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2, 2], [1, 2, 3, 4]) == pytest.approx(0.8944, abs=1e-3)
