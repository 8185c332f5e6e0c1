"""lint_rules.yaml → rules that check captions

Each kind of rule is a class here. The file defines the rules, with their words and limits.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Annotated, Any, Final, Literal, get_args

import yaml
from pydantic import Field

from capstan.pipeline.config import Section, validate

FILE: Final = "lint_rules.yaml"

Action = Literal["note", "retry", "original"]  # explained in lint_rules.yaml
ACTIONS: Final[tuple[Action, ...]] = get_args(Action)  # by increasing severity

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»")


@dataclass(frozen=True)
class Caption:
    """The caption that rules check."""

    raw: str
    text: str  # cleaned, and cut to whole sentences if the model was cut off
    pieces: Sequence[str]  # the text's words, with digits as the tokenizer separates them
    slot: str = ""
    prompt: str = ""
    language: str | None = None  # the required one
    cut: bool = False  # cut by the token limit
    whole: bool = True  # False: cut within its first sentence

    @cached_property
    def length(self) -> float:
        """Number of words. In a script without spaces, a fixed number of letters counts as a word."""
        letters = load().letters
        spread = "".join(f" {c}" if c.isalpha() and script(c) in letters else c for c in self.text)
        return sum(1 / letters.get(script(word[0]), 1) for word in spread.split())


class _Rule(Section, ABC):
    name: str
    reason: str
    action: Action

    @abstractmethod
    def applies(self, caption: Caption) -> bool:
        """Return whether the caption has this problem."""


class Empty(_Rule):
    kind: Literal["empty"]

    def applies(self, caption: Caption) -> bool:
        return not any(c.isalnum() for c in caption.text)


class NoEnd(_Rule):
    kind: Literal["no_end"]

    def applies(self, caption: Caption) -> bool:
        return caption.cut


class Unfinished(_Rule):
    kind: Literal["unfinished"]
    last_words: dict[str, list[str]]  # per language
    named_by: list[str]  # words after which the last word is a name
    last_marks: list[str]

    def applies(self, caption: Caption) -> bool:
        text = caption.text.lower()
        *_, before, last = ["", "", *text.split()]
        open_ended = last in self.last_words.get(caption.language or "", ()) and before not in self.named_by
        return bool(text) and (not caption.whole or open_ended or text.endswith(tuple(self.last_marks)))


class Loop(_Rule):
    kind: Literal["loop"]
    words: int
    times: int
    pieces: int
    signs: int
    sentences: int

    def applies(self, caption: Caption) -> bool:
        if re.search(rf"(\S)\1{{{self.signs - 1}}}", caption.text):
            return True
        counts = Counter(tuple(words(part)) for part in re.split(r"[.!?]", caption.text))
        again = any(count >= self.sentences for sentence, count in counts.items() if len(sentence) >= 4)
        row = in_a_row(caption.text.split(), self.words, self.times)
        return again or row or in_a_row(caption.pieces, self.words, self.pieces)


class Patterns(_Rule):
    kind: Literal["patterns"]
    at: Literal["start", "anywhere"]
    patterns: list[str]

    def applies(self, caption: Caption) -> bool:
        start = r"^\W*" if self.at == "start" else ""
        return any(_compiled(start + f"(?:{pattern})").search(caption.text) for pattern in self.patterns)


class Prompt(_Rule):
    kind: Literal["prompt"]
    overlap: int
    patterns: list[str]

    def applies(self, caption: Caption) -> bool:
        if any(_compiled(pattern).search(caption.raw) for pattern in self.patterns):
            return True
        prompt, text = (_runs(words(text), self.overlap) for text in (caption.prompt, caption.text))
        return not prompt.isdisjoint(text)


class InLanguage(_Rule):
    kind: Literal["language"]
    share: float
    letters: int
    words: int

    def applies(self, caption: Caption) -> bool:
        if caption.language is None:
            return False
        languages, text = load().languages, _QUOTED.sub(" ", caption.text)
        own = languages[caption.language]
        scripts = Counter(script(c) for c in text if c.isalpha())
        strange = sum(count for name, count in scripts.items() if name not in own.scripts)
        if strange >= self.letters and strange > self.share * scripts.total():
            return True
        found = set(words(text))
        small = {name: len(found & language.small) for name, language in languages.items()}
        mine = small.pop(caption.language)
        return bool(own.words) and max(small.values(), default=0) >= max(self.words, 2 * mine + 1)


class Words(_Rule):
    kind: Literal["words"]
    least: dict[str, int] = Field(default={})  # slot → words; `other` applies to slots that are not listed
    most: dict[str, int] = Field(default={})

    def applies(self, caption: Caption) -> bool:
        count = caption.length
        least, most = (limits.get(caption.slot, limits.get("other")) for limits in (self.least, self.most))
        return count > 0 and ((least is not None and count < least) or (most is not None and count > most))


Rule = Annotated[
    Empty | NoEnd | Unfinished | Loop | Patterns | Prompt | InLanguage | Words, Field(discriminator="kind")
]


class Language(Section):
    scripts: list[str]
    words: list[str]

    @cached_property
    def small(self) -> frozenset[str]:
        return frozenset(self.words)


class Rules(Section):
    rules: list[Rule]
    languages: dict[str, Language]
    letters: dict[str, Annotated[float, Field(ge=1)]]  # script without spaces between words → letters per word

    def content(self) -> dict[str, Any]:
        """Return the rules without their reasons."""
        return self.model_dump(mode="json", exclude={"rules": {"__all__": {"reason"}}})


@cache
def load() -> Rules:
    """Return Capstan's rules."""
    text = resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
    return validate(Rules, yaml.safe_load(text), FILE)


def words(text: str) -> list[str]:
    """Return the words in lower case, without punctuation.

    >>> words("A dog's ball, red.")
    ['a', "dog's", 'ball', 'red']
    """
    return _WORD.findall(text.lower())


def in_a_row(sequence: Sequence[str], longest: int = 8, times: int = 3) -> bool:
    """Return whether a run of up to `longest` words occurs `times` times in a row.

    >>> in_a_row("a cat on a mat on a mat on a mat".split())
    True
    """
    for length in range(1, longest + 1):
        run = 0  # consecutive words that equal the word `length` before them
        for before, word in zip(sequence, sequence[length:], strict=False):
            run = run + 1 if word == before else 0
            if run >= length * (times - 1):
                return True
    return False


@cache
def script(letter: str) -> str:
    """Return a letter's script: the first word of its Unicode name.

    >>> script("a"), script("я")
    ('LATIN', 'CYRILLIC')
    """
    return unicodedata.name(letter, "").partition(" ")[0]


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def _runs(sequence: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(sequence[start : start + length]) for start in range(len(sequence) - length + 1)}
