"""Cleaning undoes what tokenizers do to text; flags say what is wrong; nothing else is touched."""

from __future__ import annotations

import doctest

import pytest

from recaption import lint
from recaption.lint import clean, loops


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(lint).failed == 0


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("a dog .", "a dog."),
        ("  two   dogs , one ( brown ) and a cat !", "two dogs, one (brown) and a cat!"),
        ("a sign that says 1 0 % off", "a sign that says 10% off"),
        ("it 's the dog 's ball", "it's the dog's ball"),
        ("A Dog. No Change Of Case - or dashes", "A Dog. No Change Of Case - or dashes"),
        ("line\nbreak\x00 and\ttab", "line break and tab"),
        ("", ""),
    ],
)
def test_clean(raw: str, text: str) -> None:
    assert clean(raw) == text
    assert clean(text) == text


@pytest.mark.parametrize(
    ("raw", "finish", "text", "flags"),
    [
        ("a red circle .", "end", "a red circle.", ()),
        ("", "end", "", ("empty",)),
        (" ", "length", "", ("empty", "unfinished")),
        ("circle", "end", "circle", ("short",)),
        ("a red circle on a", "length", "a red circle on a", ("unfinished",)),
        ("a circle . a star ! a", "length", "a circle. a star!", ("unfinished",)),
        ("2 2 2 2 2 2", "end", "222222", ("short",)),
        ("a cat and a cat and a cat and", "end", "a cat and a cat and a cat and", ("loop",)),
        ("word " * 3, "end", "word word word", ("loop",)),
        (" ".join(map(str, range(1000, 1250))).replace("1", "x"), "end", None, ("long",)),
    ],
)
def test_lint(raw: str, finish: lint.Finish, text: str | None, flags: tuple[str, ...]) -> None:
    found = lint.lint(raw, finish)
    assert found.flags == flags
    assert text is None or found.text == text


def test_what_only_returns_is_no_loop() -> None:
    assert "loop" not in lint.lint("a red circle, a red star, a red square and a red cross", "end").flags
    assert not loops(["very", "very", "big"])
