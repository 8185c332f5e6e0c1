"""Caption measures."""

from typing import Any

import pytest

from capstan.pipeline.config import CaptionScore
from capstan.pipeline.score.caption import CaptionMeasures
from capstan.pipeline.score.scorer import Sample


def measured(text: str, **settings: Any) -> dict[str, Any]:
    found = CaptionMeasures(CaptionScore(**settings)).score([Sample(text)])
    return {name.removeprefix("caption_"): values[0] for name, values in found.items()}


@pytest.mark.parametrize(
    ("text", "length", "words", "script"),
    [
        ("Two dogs, one cat", 17, 4, "latin"),
        ("l'été: a mother-in-law's café", 29, 4, "latin"),
        ("Красная площадь", 15, 2, "cyrillic"),
        ("赤い車", 3, 3, "cjk"),
        ("12:30", 5, 2, ""),
        ("", 0, 0, ""),
    ],
)
def test_length_words_and_script(text: str, length: int, words: int, script: str) -> None:
    found = measured(text)
    assert (found["length"], found["words"], found["script"]) == (length, words, script)


def test_letters_and_repetition_are_shares() -> None:
    assert measured("ab 12")["letters"] == pytest.approx(0.5)
    assert measured("buy Buy buy now")["repetition"] == pytest.approx(0.5)
    assert measured("one two three")["repetition"] == 0
    assert measured("")["letters"] == measured("")["repetition"] == 0


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("a cat by the window", set()),
        ("see https://example.org/cat", {"url"}),
        ("from shop.example.com today", {"url"}),
        ("write to anna.smith+x@mail.example.org", {"email", "url"}),
        ("IMG_20240131.JPG", {"file"}),
        ("DSC00123", {"file"}),
        ("Royalty-free stock photo", {"boilerplate"}),
        ("CLICK TO enlarge", {"boilerplate"}),
        ("a downloaded look", set()),
        ("version 2.5 of the car", set()),
    ],
)
def test_text_that_is_not_a_caption_is_flagged(text: str, flags: set[str]) -> None:
    found = measured(text)
    assert {name for name in ("url", "email", "file", "boilerplate") if found[name]} == flags


def test_boilerplate_can_be_added_to_and_makes_another_scorer() -> None:
    assert not measured("Visit our store")["boilerplate"]
    assert measured("Visit our store", boilerplate=["Our Store"])["boilerplate"]
    ids = {CaptionMeasures(CaptionScore(boilerplate=phrases)).id for phrases in ([], ["x"], ["x", "x"])}
    assert len(ids) == 2
