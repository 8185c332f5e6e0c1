"""docs/models.md has a line for every family, whose page and example are there."""

import re

import pytest
from repo import ROOT

from capstan.training.config.families import FAMILIES

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
LINES = dict(re.findall(r"^\| \[`(\w+)`\]\(([\w.#-]+)\) \|", PAGE, re.MULTILINE))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_on_the_page_that_it_links(family: str) -> None:
    assert family in LINES
    page = (ROOT / "docs" / LINES[family].partition("#")[0]).read_text(encoding="utf-8")
    assert re.search(rf"^ *-? ?model: {family}$|`model: {family}`", page, re.MULTILINE)


def test_the_page_names_no_family_that_is_not_there() -> None:
    assert set(LINES) <= set(FAMILIES)
