"""An image that a CLIP raises on costs no other image of its batch its score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from capstan.pipeline.score.clip_model import ClipModel
from capstan.pipeline.score.clip_score import ClipSimilarity, Embeddings
from capstan.pipeline.score.job import Batch, _read


def test_a_clip_that_raises_on_one_image_scores_the_others(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ClipModel(str(clip), None, "fp32", "score.clip")
    loaded = model.load("cpu")
    drawn = np.random.default_rng(0).integers(1, 255, (5, 80, 60, 3), dtype=np.uint8)
    pixels = np.stack([model.prepare(image) for image in drawn])
    captions = [f"image {number}" for number in range(5)]
    scorers = [ClipSimilarity(model), Embeddings(model)]
    sound = [scorer.score(Batch(loaded, pixels, captions)) for scorer in scorers]
    pixels[3] = 0
    images = loaded.images

    def raises_on_black(batch: np.ndarray) -> object:
        if (batch == 0).all(axis=(1, 2, 3)).any():
            raise RuntimeError("shape mismatch")
        return images(batch)

    monkeypatch.setattr(loaded, "images", raises_on_black)
    for scorer, whole in zip(scorers, sound, strict=True):
        (places, columns), errors = _read(scorer, Batch(loaded, pixels, captions))
        assert places == [0, 1, 2, 4]
        assert errors == {3: "model_error: RuntimeError: shape mismatch"}
        for name, values in columns.items():
            np.testing.assert_array_equal(values, np.asarray(whole[name])[places])
