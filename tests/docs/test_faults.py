"""docs/faults.md: every row names a test that is there."""

from __future__ import annotations

import re

from repo import ROOT

PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| what goes wrong")]


def test_every_row_names_its_test() -> None:
    assert len(ROWS) > 25
    for row in ROWS:
        fault, answer, test = (cell.strip() for cell in row.strip("|").split(" | "))
        assert fault
        assert answer
        named = re.fullmatch(r"`(\S+\.py)::(test_\w+)`", test)
        assert named, row
        file = ROOT / "tests" / named[1]
        assert file.is_file(), named[1]
        assert re.search(rf"^def {named[2]}\(", file.read_text(encoding="utf-8"), re.M), test


def test_no_test_stands_for_two_faults() -> None:
    tests = [row.rsplit("`", 2)[1] for row in ROWS]
    assert len(tests) == len(set(tests))
