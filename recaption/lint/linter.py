"""Raw caption → cleaned text, flags, and the action to take

The rules, each with its reason, are in lint_rules.yaml. The caption store keeps the raw text next to the cleaned one.
Cleaning only reverses tokenization. Correcting style (openers, case, a final full stop) would bias every caption.
Captions that people wrote are not changed.
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

# Ended by the model, cut by the token limit, written by people, no caption.
Finish = Literal["end", "length", "given", "none"]

# Flags not set by rules: the image cannot be decoded; the engine returned no caption; the original caption is used.
UNREADABLE, FAILED, ORIGINAL = "unreadable", "failed", "original"

_JOINERS: Final = "\u200c\u200d"  # not printable, but part of the spelling of Hindi, Persian and composed emoji
_BEFORE_PUNCTUATION = re.compile(r"\s+([.,;:!?%)\]}])")
_AFTER_BRACKET = re.compile(r"([(\[{])\s+")
_CONTRACTION = re.compile(r"(?<=\w)\s+('(?:s|t|re|ve|m|ll|d)\b)")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")  # CLIP's tokenizer separates all digits
# A full-width mark needs no space after it; closing quotes belong to the sentence.
_SENTENCE_END = re.compile(r"[.!?؟।](?=\s|$)|[。！？]+[」』”’）]*")


class Settings(Section):
    """The recipe's section `recaption.lint`; part of the layer's id."""

    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Maximum number of further attempts at a bad caption."""
    language: str | None = "en"
    """Required language of captions; null: any."""
    actions: dict[str, Action] = Field(default={})
    """Rule → original, retry or note; overrides the rule's own action."""

    @field_validator("language")
    @classmethod
    def _is_known(cls, language: str | None) -> str | None:
        known = load().languages
        if language is not None and language not in known:
            raise ValueError(f"{language} is not one of {', '.join(known)}; use one of them, or null")
        return language

    @field_validator("actions")
    @classmethod
    def _are_rules(cls, actions: dict[str, Action]) -> dict[str, Action]:
        known = [rule.name for rule in load().rules]
        for name in actions:
            if name not in known:
                raise ValueError(f"{name} is not a rule; the rules are {', '.join(known)}")
        return actions


@dataclass(frozen=True)
class Linted:
    """A cleaned caption with its flags and action."""

    text: str  # cleaned; empty if nothing is left to train on
    flags: tuple[str, ...] = ()  # names of the matching rules, sorted
    action: Action = "note"  # the most severe of theirs

    @property
    def severity(self) -> int:
        """0: keep; 1: retry; 2: not a usable caption."""
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
    """Clean a caption, unless people wrote it, and check it against the rules.

    `prompt` is the prompt of its slot; `parted`: the text was decoded by CLIP's tokenizer.

    >>> lint("a red circle , left of a star . the back", "length", parted=True)
    Linted(text='a red circle, left of a star.', flags=('no_end',), action='retry')
    """
    settings, text = settings or _DEFAULT, raw if finish == "given" else _spaced(raw, parted)
    whole = finish != "length"
    if not whole and (ends := [match.end() for match in _SENTENCE_END.finditer(text)]):
        text, whole = text[: ends[-1]], True
    pieces = text.split()  # separated digits count one by one
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
    matching = [rule for rule in load().rules if rule.applies(caption)]
    actions = [settings.actions.get(rule.name, rule.action) for rule in matching]
    return Linted(
        caption.text, tuple(sorted(rule.name for rule in matching)), max(actions, key=ACTIONS.index, default="note")
    )


@cache
def identity() -> dict[str, Any]:
    """Return the versions of cleaning and rules: part of a layer's id."""
    return {"cleaning": VERSION, "rules": fingerprint(load().content())}


def reasons() -> Mapping[str, str]:
    """Return flag → why it matters."""
    others = {
        UNREADABLE: "The image cannot be decoded; the next run retries it.",
        FAILED: "The engine returned no caption; the next run retries it.",
        ORIGINAL: "The original caption is used instead.",
    }
    return {rule.name: rule.reason for rule in load().rules} | others


@cache
def known_flags() -> frozenset[str]:
    """Return the flags that are not reasons of failures."""
    return frozenset(reasons())


def clean(raw: str, *, parted: bool = False) -> str:
    """Remove control characters and repeated spaces.

    `parted`: also remove the spaces that CLIP's tokenizer puts around punctuation and between digits.

    >>> clean("un chien !\\n 5 000 francs"), clean("a dog 's  2 0 balls , ( red ) .", parted=True)
    ('un chien ! 5 000 francs', "a dog's 20 balls, (red).")
    """
    text = _spaced(raw, parted)
    return _BETWEEN_DIGITS.sub("", text) if parted else text


def _spaced(raw: str, parted: bool) -> str:
    """Return the text as `clean` does, but keep separated digits."""
    text = " ".join("".join(c if c.isprintable() or c in _JOINERS else " " for c in raw).split())
    for pattern in (_BEFORE_PUNCTUATION, _AFTER_BRACKET, _CONTRACTION) if parted else ():
        text = pattern.sub(r"\1", text)
    return text


def sentences(text: str) -> list[str]:
    """Split a text into sentences, with their punctuation.

    >>> sentences("a cat. it sleeps! and")
    ['a cat.', 'it sleeps!', 'and']
    """
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    parts = [text[start:stop].strip() for start, stop in itertools.pairwise(ends)]
    return [part for part in parts if part]


_DEFAULT: Final = Settings()
