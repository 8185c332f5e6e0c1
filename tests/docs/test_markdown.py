"""README and docs as text: links lead somewhere, paths and modules exist, and lines are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import DOCS, PAGES, name_of, prose
from repo import ROOT
from source_tree import FLOORS, MODULES, module_of
from wrap_pages import LENGTH

LINK = re.compile(r"(?:\]\(|src=\")([^)\s\"]+)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(rf"(?:{'|'.join((*FLOORS, 'capstan', 'tests', 'benchmarks', 'docs', 'examples'))})/[\w./-]+")
MODULE = re.compile(rf"capstan\.(?:{'|'.join(FLOORS)})(?:\.[A-Za-z_]\w*)*")

pytestmark = pytest.mark.parametrize("page", PAGES, ids=[name_of(page) for page in PAGES])


def test_lines_are_short(page: Path) -> None:
    """Tables cannot be wrapped, nor can a line that is one link or image."""
    long = [
        f"{number}: {line[:60]}…"
        for number, line in prose(page)
        if len(line) > LENGTH and not line.startswith("|") and not re.fullmatch(r"[-*> ]*!?\[[^]]*\]\(\S+\)", line)
    ]
    assert not long, "run `make format`"


def test_code_is_fenced_with_its_language(page: Path) -> None:
    """Commands and recipes in fenced blocks are checked by test_commands.py; indented ones would pass unseen."""
    assert not [f"{number}: {line}" for number, line in prose(page) if line.startswith("    ")]
    assert not re.findall(r"\n\n *```\n", page.read_text(encoding="utf-8"))


def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files of the repository, and headings that exist in them. Pages of docs/ stay within it."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert page.parent != DOCS or target.is_relative_to(DOCS), f"{link} is not part of the site"
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub and mkdocs make of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_paths_and_modules_exist(page: Path) -> None:
    """What stands in `code` and looks like a file or a module of this repository is one. History may name old ones."""
    if page.name == "CHANGELOG.md":
        return
    for _, line in prose(page):
        for code in CODE.findall(line):
            if PATH.fullmatch(code):
                assert (ROOT / code).exists(), code
            if MODULE.fullmatch(code):
                assert code in MODULES or module_of(code) not in (None, "capstan"), code
