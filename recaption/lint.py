"""A caption as the model wrote it → the text that training sees, what is wrong with it, and what to do about that.

The rules, each with its reason, are data: lint_rules.yaml. The raw text is kept beside the cleaned one in the caption
store. Cleaning undoes what tokenizers do to text and mends nothing else: taste applied here (openers, case, a final
full stop) would be a bias in every caption.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator

from pipeline.config import Section, fingerprint
from recaption.rules import ACTIONS, Action, Caption, load

VERSION: Final = 2  # of the cleaning below; with the rules it is part of a layer's id

# End token, cut by the limit, not made by a model, no caption.
Finish = Literal["end", "length", "given", "none"]

# Flags that no rule sets: the picture cannot be decoded; the engine gave no caption; the original caption stands in.
UNREADABLE, FAILED, ORIGINAL = "unreadable", "failed", "original"

_BEFORE_PUNCTUATION = re.compile(r"\s+([.,;:!?%)\]}])")
_AFTER_BRACKET = re.compile(r"([(\[{])\s+")
_CONTRACTION = re.compile(r"(?<=\w)\s+('(?:s|t|re|ve|m|ll|d)\b)")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")  # CLIP's tokenizer parts all digits
_SENTENCE_END = re.compile(r"[.!?。！？](?=\s|$)")


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


def lint(raw: str, finish: Finish, settings: Settings | None = None, *, slot: str = "", prompt: str = "") -> Linted:
    """Clean a caption and hold it against the rules. `prompt` is what the model was asked for this slot.

    >>> lint("a red circle , left of a star . the back", "length")
    Linted(text='a red circle, left of a star.', flags=('no_end',), action='retry')
    """
    settings, text = settings or _DEFAULT, clean(raw)
    whole = finish != "length"
    if not whole and (ends := [match.end() for match in _SENTENCE_END.finditer(text)]):
        text, whole = text[: ends[-1]], True
    caption = Caption(
        raw=raw, text=text, slot=slot, prompt=prompt, language=settings.language, cut=finish == "length", whole=whole
    )
    found = [rule for rule in load().rules if rule.applies(caption)]
    actions = [settings.actions.get(rule.name, rule.action) for rule in found]
    return Linted(text, tuple(sorted(rule.name for rule in found)), max(actions, key=ACTIONS.index, default="note"))


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


def clean(raw: str) -> str:
    """The text without control characters, and with the spaces that a writer would set.

    >>> clean("a dog 's  2 0 balls , ( red ) .")
    "a dog's 20 balls, (red)."
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in raw).split())
    for pattern, replacement in (
        (_BEFORE_PUNCTUATION, r"\1"),
        (_AFTER_BRACKET, r"\1"),
        (_CONTRACTION, r"\1"),
        (_BETWEEN_DIGITS, ""),
    ):
        text = pattern.sub(replacement, text)
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
