"""Images against prompts: by the sentences of a prompt, one number each, kept whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.prompt_score import read
from capstan.training.experiment.config import Scorer
from capstan.training.experiment.contact_sheet import side_by_side
from capstan.training.experiment.measure import SHOWN, Measurements, clip_scores, open_scorer, score_images
from capstan.training.experiment.prompts import Prompt


class Clip:
    """Knows two words, red and blue, and three at most at a time; an image's embedding is its colour."""

    def fits(self, text: str) -> bool:
        return len(text.split()) <= 3

    def images(self, files: Sequence[bytes]) -> np.ndarray:
        assert all(file.startswith(b"\x89PNG") for file in files)
        return np.eye(2, dtype=np.float32)[[0] * len(files)]  # all are red

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        assert all(self.fits(text) for text in texts)
        return np.eye(2, dtype=np.float32)[[int("blue" in text) for text in texts]]


def test_the_clip_score_is_of_sentences_and_long_ones_are_cut() -> None:
    clip: Any = Clip()
    images = np.zeros((3, 8, 8, 3), np.uint8)
    mean, least = clip_scores(clip, images, ["a red thing.", "a red thing. a blue thing.", "red red red blue red red"])
    assert mean.tolist() == [100, 50, 50]
    assert least.tolist() == [100, 0, 0]
    prompts = [Prompt("red square", 0, wanted=read("red square")), Prompt("blue", 1)]
    columns = score_images(prompts, images[:2], clip)
    assert set(columns) == {"clip_mean", "clip_min"}  # no oracle where some prompt has no truth
    assert score_images(prompts[:1], images[:1], None)["followed"] == [0.0]
    assert score_images(prompts[:1], images[:1], None)["relation"] == [None]


def test_a_scorer_that_is_not_there_is_named_by_the_recipes_key() -> None:
    assert open_scorer(None) is None
    with pytest.raises(RecipeError, match=r"experiment\.scorer\.model"):
        open_scorer(Scorer(model="no-such-clip"))
    with pytest.raises(RecipeError, match=r"experiment\.scorer\.pretrained"):
        open_scorer(Scorer(model="ViT-B-32"))


def test_what_was_measured_is_read_back(tmp_path: Path) -> None:
    kept = Measurements(Storage(str(tmp_path)))
    assert kept.read("original-s0", 20) is None
    assert kept.images("original-s0", "descriptive") == []
    images = np.random.default_rng(0).integers(0, 256, (SHOWN + 3, 16, 16, 3), dtype=np.uint8)
    kept.write("original-s0", 20, {"step": 20}, {"descriptive": images})
    assert kept.read("original-s0", 20) == {"step": 20}
    shown = kept.images("original-s0", "descriptive")
    assert len(shown) == SHOWN
    assert all((a == b).all() for a, b in zip(shown, images, strict=False))


def test_images_of_any_size_make_a_sheet() -> None:
    for side in (16, 500):
        image = np.zeros((side, side, 3), np.uint8)
        rows = [("a prompt " * 60, {"truth": image, "a": image}), ("é → 图", {"truth": None, "a": image})]
        assert side_by_side(rows).startswith(b"\x89PNG")
