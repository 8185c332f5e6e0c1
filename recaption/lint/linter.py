"""A caption as the model wrote it → the text that training sees, what is wrong with it, and what to do about that.

The rules, each with its reason, are data: lint_rules.yaml. The raw text is kept beside the cleaned one in the caption
store. Cleaning undoes what a tokenizer did to the text and mends nothing else: taste applied here (openers, case, a
final full stop) would be a bias in every caption. What people wrote stays as it is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator

from capstan.pipeline.config import Section, fingerprint
from capstan.recaption.lint.rules import ACTIONS, Action, Caption, load

VERSION: Final = 3  # of the cleaning below; with the rules it is part of a layer's id

# End token, cut by the limit, not made by a model, no caption.
Finish = Literal["end", "length", "given", "none"]

# Flags that no rule sets: the image cannot be decoded; the engine gave no caption; the original caption stands in.
UNREADABLE, FAILED, ORIGINAL = "unreadable", "failed", "original"

_JOINERS: Final = "\u200c\u200d"  # not printable, and part of how Hindi, Persian and families of emoji are spelt
_BEFORE_PUNCTUATION = re.compile(r"\s+([.,;:!?%)\]}])")
_AFTER_BRACKET = re.compile(r"([(\[{])\s+")
_CONTRACTION = re.compile(r"(?<=\w)\s+('(?:s|t|re|ve|m|ll|d)\b)")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")  # CLIP's tokenizer parts all digits
# A full-width mark needs no space after it, and what it closes is part of the sentence.
_SENTENCE_END = re.compile(r"[.!?؟।](?=\s|$)|[。！？]+[」』”’）]*")


class Settings(Section):
    """The recipe's section `recaption.lint`; part of the layer's id."""

    retries: Annotated[int, Field(ge=0, le=10)] = 2  # other captions drawn, at most, where something is wrong with one
    language: str | None = "en"  # that captions must be in; null: any
    actions: dict[str, Action] = Field(default={})  # rule → original, retry or note, instead of the rules' own

    @field_validator("language")
    @classmethod
    def _is_known(cls, language: str | None) -> str | None:
        known = load().languages
        if language is not None and language not in known:
            raise ValueError(f"{language} is not one of {', '.join(known)}; name one of them, or write null")
        return language

    @field_validator("actions")
    @classmethod
    def _are_rules(cls, actions: dict[str, Action]) -> dict[str, Action]:
        known = [rule.name for rule in load().rules]
        for name in actions:
            if name not in known:
                raise ValueError(f"{name} is no rule; the rules are {', '.join(known)}")
        return actions


@dataclass(frozen=True)
class Linted:
    text: str  # cleaned; empty where nothing is left to train on
    flags: tuple[str, ...] = ()  # names of the rules that apply, sorted
    action: Action = "note"  # the hardest of theirs

    @property
    def severity(self) -> int:
        """0: to be kept; 1: worth another try; 2: no caption at all."""
        return ACTIONS.index(self.action)


def lint(
    raw: str,
    finish: Finish,
    settings: Settings | None = None,
    *,
    slot: str = "",
    prompt: str = "",
    parted: bool = False,
) -> Linted:
    """Clean a caption, unless people gave it, and hold it against the rules.

    `prompt` is what the model was asked for this slot; `parted` says that it wrote with CLIP's tokenizer.

    >>> lint("a red circle , left of a star . the back", "length", parted=True)
    Linted(text='a red circle, left of a star.', flags=('no_end',), action='retry')
    """
    settings, text = settings or _DEFAULT, raw if finish == "given" else _spaced(raw, parted)
    whole = finish != "length"
    if not whole and (ends := [match.end() for match in _SENTENCE_END.finditer(text)]):
        text, whole = text[: ends[-1]], True
    pieces = text.split()  # the digits of a number each for itself, where the tokenizer parts them
    text = _BETWEEN_DIGITS.sub("", text) if parted else text
    caption = Caption(
        raw=raw,
        text=text if pieces else "",
        pieces=pieces,
        slot=slot,
        prompt=prompt,
        language=settings.language,
        cut=finish == "length",
        whole=whole,
    )
    found = [rule for rule in load().rules if rule.applies(caption)]
    actions = [settings.actions.get(rule.name, rule.action) for rule in found]
    return Linted(
        caption.text, tuple(sorted(rule.name for rule in found)), max(actions, key=ACTIONS.index, default="note")
    )


@cache
def identity() -> dict[str, Any]:
    """What of cleaning and rules can change a text or a flag: part of a layer's id."""
    return {"cleaning": VERSION, "rules": fingerprint(load().content())}


def reasons() -> Mapping[str, str]:
    """Flag → why it matters."""
    others = {
        UNREADABLE: "The picture cannot be decoded; it is tried again by the next run.",
        FAILED: "The engine gave no caption; it is asked again by the next run.",
        ORIGINAL: "The caption that came with the picture stands in.",
    }
    return {rule.name: rule.reason for rule in load().rules} | others


def clean(raw: str, *, parted: bool = False) -> str:
    """The text without control characters and without more than one space in a row.

    `parted`: CLIP's tokenizer set spaces around marks and between digits; they are taken away.

    >>> clean("un chien !\\n 5 000 francs"), clean("a dog 's  2 0 balls , ( red ) .", parted=True)
    ('un chien ! 5 000 francs', "a dog's 20 balls, (red).")
    """
    text = _spaced(raw, parted)
    return _BETWEEN_DIGITS.sub("", text) if parted else text


def _spaced(raw: str, parted: bool) -> str:
    """`clean`, but for digits."""
    text = " ".join("".join(c if c.isprintable() or c in _JOINERS else " " for c in raw).split())
    for pattern in (_BEFORE_PUNCTUATION, _AFTER_BRACKET, _CONTRACTION) if parted else ():
        text = pattern.sub(r"\1", text)
    return text


def sentences(text: str) -> list[str]:
    """The text's sentences, with their marks.

    >>> sentences("a cat. it sleeps! and")
    ['a cat.', 'it sleeps!', 'and']
    """
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    parts = [text[start:stop].strip() for start, stop in itertools.pairwise(ends)]
    return [part for part in parts if part]


_DEFAULT: Final = Settings()
