"""Texts, embedded by the CLIP that embedded the images, and by no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_clip import write_clip

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.clip_model import ClipModel
from capstan.pipeline.similar.text import TextEncoder


def test_a_text_is_embedded_by_the_same_clip_only(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip", 0)
    own = ClipModel(str(clip), None, "fp32", "score.clip")
    encoder = TextEncoder({"model": str(clip)}, own.identity)
    expected = own.load("cpu").texts(["a dog"])[0].numpy()
    assert np.array_equal(encoder.encode("a dog"), expected)
    other = write_clip(tmp_path / "other", 1)
    with pytest.raises(RecipeError, match="is not the CLIP that embedded the images"):
        TextEncoder({"model": str(other)}, own.identity).encode("a dog")
    (clip / "open_clip_model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"score.clip"):
        TextEncoder({"model": str(clip)}, own.identity).encode("a dog")


def test_weights_that_are_not_there_are_named_and_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(*_: object, **__: object) -> None:
        pytest.fail("the viewer downloads nothing")

    monkeypatch.setattr("open_clip.download_pretrained", fetch)
    monkeypatch.setenv("HOME", str(tmp_path))
    for tag in ("laion2b_s34b_b79k", "openai", "no-such-tag"):
        with pytest.raises(RecipeError, match=f"the weights '{tag}' of ViT-B-32 are not on this machine"):
            TextEncoder({"model": "ViT-B-32", "pretrained": tag}, {}).encode("a dog")
