"""A batch that raises is halved until the samples at fault are found; the others are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from capstan.pipeline.errors import StorageError
from capstan.pipeline.score.by_halves import by_halves, model_errors
from capstan.pipeline.score.clip_model import ClipModel
from capstan.pipeline.score.clip_score import ClipSimilarity, Embeddings
from capstan.pipeline.score.job import Batch, _read


def raising_on(*bad: int) -> Callable[[Sequence[int]], list[int]]:
    def compute(places: Sequence[int]) -> list[int]:
        if found := [place for place in places if place in bad]:
            raise ValueError(f"cannot take\n{found[0]}")
        return [place * 10 for place in places]

    return compute


@pytest.mark.parametrize("bad", [(), (0,), (6,), (2, 3), (0, 1, 2), (0, 2, 4, 6), (1, 2, 3, 4, 5, 6)])
def test_only_those_at_fault_are_flagged(bad: tuple[int, ...]) -> None:
    found, errors = by_halves(range(7), raising_on(*bad))
    assert {place: value for places, values in found for place, value in zip(places, values, strict=True)} == {
        place: place * 10 for place in range(7) if place not in bad
    }
    assert model_errors(errors) == {place: f"model_error: ValueError: cannot take {place}" for place in bad}


def test_a_model_that_raises_on_everything_is_at_fault_itself() -> None:
    with pytest.raises(ValueError, match="cannot take"):
        by_halves(range(4), raising_on(*range(4)))
    found, errors = by_halves([3], raising_on(3))
    assert (found, model_errors(errors)) == ([], {3: "model_error: ValueError: cannot take 3"})

    def storage_is_out(places: Sequence[int]) -> None:
        raise StorageError("dataset", "the bucket is away", "wait")

    with pytest.raises(StorageError):
        by_halves(range(4), storage_is_out)


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
