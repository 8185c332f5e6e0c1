"""Wrap the prose of all Markdown pages at 100 columns; tables, code, headings and images stay as they are.

`python tests/helpers/wrap_pages.py` rewrites the pages (part of `make format`).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from pages import PAGES

LENGTH = 100
_ITEM = re.compile(r"(\s*)([-*]|\d+\.)\s+")
_FIXED = ("|", "```", "#", "<", "![")  # what starts a line that is no prose
_SPACE = "\0"  # stands for a space that must not be broken at


def wrapped(page: str) -> str:
    """Return a page with every paragraph and list item wrapped.

    >>> wrapped("a\\nb\\n\\n| c |")
    'a b\\n\\n| c |'
    """
    return "\n".join(_lines(page.split("\n")))


def _lines(lines: list[str]) -> Iterator[str]:
    inside, paragraph = False, list[str]()
    for line in lines:
        fence = line.lstrip().startswith("```")
        prose = not inside and not fence and _is_prose(line)
        if paragraph and (not prose or _ITEM.match(line)):
            yield from _wrapped(paragraph)
            paragraph = []
        inside ^= fence
        if prose:
            paragraph.append(line)
        else:
            yield line
    if paragraph:
        yield from _wrapped(paragraph)


def _is_prose(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("    ") and not line.lstrip().startswith(_FIXED)


def _wrapped(paragraph: list[str]) -> list[str]:
    item = _ITEM.match(paragraph[0])
    first = item[1] if item else ""
    rest = first + " " * (len(item[2]) + 1) if item else ""
    text = " ".join(line.strip() for line in paragraph)
    text = re.sub(r"`[^`]{1,70}`", lambda code: code[0].replace(" ", _SPACE), text)
    options = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(text, LENGTH, initial_indent=first, subsequent_indent=rest, **options)  # type: ignore[arg-type]
    return [line.replace(_SPACE, " ") for line in lines]


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(wrapped(path.read_text(encoding="utf-8")), encoding="utf-8")
