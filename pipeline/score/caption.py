"""Caption measures: length, script, repetition, boilerplate, URLs, e-mail"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import pyarrow as pa

from capstan.pipeline.config import CaptionScore
from capstan.pipeline.score.scorer import Sample, SampleScorer, Values

# A word is a run of letters and digits; in scripts without spaces every character is a word.
_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0e7f]|[^\W_]+(?:['’-][^\W_]+)*")
_URL: Final = re.compile(r"(?:https?://|\bwww\.)\S+|\b[\w-]+\.(?:com|org|net|info|co\.uk)\b", re.IGNORECASE)
_EMAIL: Final = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*\w")
_FILE: Final = re.compile(
    r"\b[\w-]+\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|avif|heic|psd)\b|\b(?:img|dsc[nf]?|pict|screenshot)[-_ ]?\d{3,}\b",
    re.IGNORECASE,
)
_BOILERPLATE: Final = (
    "all rights reserved",
    "add to cart",
    "alt text",
    "click here",
    "click to",
    "click on",
    "cookie",
    "copyright",
    "download",
    "image may contain",
    "image not found",
    "image result for",
    "image unavailable",
    "loading",
    "no description",
    "no image",
    "no photo",
    "placeholder",
    "profile picture",
    "royalty free",
    "royalty-free",
    "stock image",
    "stock photo",
    "stock vector",
    "thumbnail",
    "untitled",
    "view larger",
)


class CaptionMeasures(SampleScorer):
    """Measures of the caption's text alone."""

    name: ClassVar[str] = "caption"
    sees_images: ClassVar[bool] = False
    columns: ClassVar[list[pa.Field]] = [
        pa.field("caption_length", pa.int32()),  # characters
        pa.field("caption_words", pa.int32()),
        pa.field("caption_script", pa.string()),  # of most letters, as Unicode names it: latin, cyrillic, cjk…
        pa.field("caption_letters", pa.float32()),  # share of its characters, spaces excluded, that are letters
        pa.field("caption_repetition", pa.float32()),  # share of its words that occurred in it before
        pa.field("caption_boilerplate", pa.bool_()),  # contains phrases of web pages, not of captions
        pa.field("caption_url", pa.bool_()),
        pa.field("caption_email", pa.bool_()),
        pa.field("caption_file", pa.bool_()),  # a file name, or a camera's image name
    ]

    def __init__(self, config: CaptionScore) -> None:
        self._phrases = sorted({phrase.casefold() for phrase in (*_BOILERPLATE, *config.boilerplate)})

    def settings(self) -> dict[str, Any]:
        return {"boilerplate": self._phrases}

    def score(self, samples: Sequence[Sample]) -> dict[str, Values]:
        boilerplate = _any_of(tuple(self._phrases))
        rows = [self._one(sample.caption, boilerplate) for sample in samples]
        return {field.name: list(values) for field, values in zip(self.columns, zip(*rows, strict=True), strict=True)}

    @staticmethod
    def _one(text: str, boilerplate: re.Pattern[str]) -> tuple[Any, ...]:
        words = [word.casefold() for word in _WORD.findall(text)]
        letters = [character for character in text if character.isalpha()]
        solid = sum(not character.isspace() for character in text)
        scripts = Counter(map(script, letters))
        return (
            len(text),
            len(words),
            min(scripts, key=lambda name: (-scripts[name], name)) if scripts else "",
            len(letters) / solid if solid else 0.0,
            1 - len(set(words)) / len(words) if words else 0.0,
            boilerplate.search(text.casefold()) is not None,
            _URL.search(text) is not None,
            _EMAIL.search(text) is not None,
            _FILE.search(text) is not None,
        )


@functools.cache
def _any_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that finds any of the phrases as whole words."""
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, phrases)) + r")(?!\w)")


@functools.lru_cache(maxsize=1 << 16)
def script(letter: str) -> str:
    """Return the script of a letter, from its Unicode name.

    >>> script("é"), script("я"), script("漢")
    ('latin', 'cyrillic', 'cjk')
    """
    return unicodedata.name(letter, "unknown").partition(" ")[0].partition("-")[0].lower()
