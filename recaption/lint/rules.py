"""lint_rules.yaml → rules, each of which says whether it applies to a caption.

A kind of rule is a class here; which rules there are, and with which words and limits, is the file's.
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

Action = Literal["note", "retry", "original"]  # lint_rules.yaml says what they mean
ACTIONS: Final[tuple[Action, ...]] = get_args(Action)  # the hardest last

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»")


@dataclass(frozen=True)
class Caption:
    """What a rule is asked about."""

    raw: str
    text: str  # cleaned, and cut to whole sentences where the model was cut off
    pieces: Sequence[str]  # the text's words as the tokenizer parts them: each digit of a number for itself, or not
    slot: str = ""
    prompt: str = ""
    language: str | None = None  # that it should be in
    cut: bool = False  # by the token limit
    whole: bool = True  # not within its first sentence

    @cached_property
    def length(self) -> float:
        """Words. Where a script sets no spaces between them, some number of its letters stands for one."""
        letters = load().letters
        spread = "".join(f" {c}" if c.isalpha() and script(c) in letters else c for c in self.text)
        return sum(1 / letters.get(script(word[0]), 1) for word in spread.split())


class _Rule(Section, ABC):
    name: str
    reason: str
    action: Action

    @abstractmethod
    def applies(self, caption: Caption) -> bool:
        """Whether this is wrong with a caption."""


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
    last_words: dict[str, list[str]]  # of each language
    named_by: list[str]  # words after which a last word is a name
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
        said = Counter(tuple(words(part)) for part in re.split(r"[.!?]", caption.text))
        again = any(count >= self.sentences for sentence, count in said.items() if len(sentence) >= 4)
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
        asked, said = (_runs(words(text), self.overlap) for text in (caption.prompt, caption.text))
        return not asked.isdisjoint(said)


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
        said = set(words(text))
        small = {name: len(said & language.small) for name, language in languages.items()}
        mine = small.pop(caption.language)
        return bool(own.words) and max(small.values(), default=0) >= max(self.words, 2 * mine + 1)


class Words(_Rule):
    kind: Literal["words"]
    least: dict[str, int] = Field(default={})  # words a slot; `other` stands for slots that are not named
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
    letters: dict[str, Annotated[float, Field(ge=1)]]  # script without spaces between words → letters a word

    def content(self) -> dict[str, Any]:
        """What decides; not how it is explained."""
        return self.model_dump(mode="json", exclude={"rules": {"__all__": {"reason"}}})


@cache
def load() -> Rules:
    """The rules that Capstan comes with."""
    text = resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
    return validate(Rules, yaml.safe_load(text), FILE)


def words(text: str) -> list[str]:
    """The words, lower-case, without marks.

    >>> words("A dog's ball, red.")
    ['a', "dog's", 'ball', 'red']
    """
    return _WORD.findall(text.lower())


def in_a_row(said: Sequence[str], longest: int = 8, times: int = 3) -> bool:
    """Whether some run of up to `longest` words stands `times` times in a row.

    >>> in_a_row("a cat on a mat on a mat on a mat".split())
    True
    """
    for length in range(1, longest + 1):
        run = 0  # words in a row that equal the word `length` before
        for before, word in zip(said, said[length:], strict=False):
            run = run + 1 if word == before else 0
            if run >= length * (times - 1):
                return True
    return False


@cache
def script(letter: str) -> str:
    """The script that a letter belongs to, as the first word of its Unicode name.

    >>> script("a"), script("я")
    ('LATIN', 'CYRILLIC')
    """
    return unicodedata.name(letter, "").partition(" ")[0]


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def _runs(said: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(said[start : start + length]) for start in range(len(said) - length + 1)}
