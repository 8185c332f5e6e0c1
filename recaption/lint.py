"""A caption as the model wrote it → the text that training sees, and flags for what is wrong with it.

The raw text is kept beside the cleaned one in the caption store. Cleaning undoes what tokenizers do to text and mends
nothing else: taste applied here (openers, case, a final full stop) would be a bias in every caption.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

VERSION: Final = 1  # of the rules below; part of a layer's id

Finish = Literal["end", "length", "given", "none"]  # end token, cut by the limit, not made by a model, no caption

MIN_WORDS: Final = 2
MAX_WORDS: Final = 200
LOOP: Final = 3  # so many times the same words in a row are a loop

EMPTY, UNFINISHED, LOOPING, SHORT, LONG, UNREADABLE = "empty", "unfinished", "loop", "short", "long", "unreadable"

_BEFORE_PUNCTUATION = re.compile(r"\s+([.,;:!?%)\]}])")
_AFTER_BRACKET = re.compile(r"([(\[{])\s+")
_CONTRACTION = re.compile(r"(?<=\w)\s+('(?:s|t|re|ve|m|ll|d)\b)")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")  # CLIP's tokenizer parts all digits
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


@dataclass(frozen=True)
class Linted:
    text: str  # cleaned; empty where nothing is left to train on
    flags: tuple[str, ...]  # sorted


def lint(raw: str, finish: Finish) -> Linted:
    """Clean a caption and flag it.

    >>> lint("a red circle , left of a star . the back", "length")
    Linted(text='a red circle, left of a star.', flags=('unfinished',))
    """
    text = clean(raw)
    flags = set()
    if finish == "length":
        flags.add(UNFINISHED)
        text = _whole_sentences(text)
    words = text.split()
    if not words:
        flags.add(EMPTY)
    elif len(words) < MIN_WORDS:
        flags.add(SHORT)
    elif len(words) > MAX_WORDS:
        flags.add(LONG)
    if loops(words):
        flags.add(LOOPING)
    return Linted(text, tuple(sorted(flags)))


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


def loops(words: list[str]) -> bool:
    """Whether some run of up to eight words stands three times in a row.

    >>> loops("a cat on a mat on a mat on a mat".split())
    True
    """
    for length in range(1, 9):
        run = 0  # words in a row that equal the word `length` before
        for before, word in zip(words, words[length:], strict=False):
            run = run + 1 if word == before else 0
            if run >= length * (LOOP - 1):
                return True
    return False


def _whole_sentences(text: str) -> str:
    """What stands up to the last sentence's end; all of it where no sentence ends."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text
