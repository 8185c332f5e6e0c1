"""The table "Where a change goes" of docs/architecture.md names files and names that exist."""

from __future__ import annotations

import re

import pytest
from pages import DOCS
from repo import ROOT

PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## Where a change goes\n")[2].partition("\n## ")[0]
ROWS = [line for line in TABLE.splitlines() if line.startswith("| a")]


def test_the_table_is_found() -> None:
    assert len(ROWS) > 15


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip() for row in ROWS])
def test_every_name_is_in_a_file_of_its_row(row: str) -> None:
    """A bare file name is in the folder of a path before it; any other name stands in one of the row's files."""
    paths, names = [], []
    for code in re.findall(r"`([^`]+)`", row):
        if "/" in code:
            paths.append(ROOT / code)
        elif code.endswith((".py", ".toml")):
            folders = [ROOT, *(path if path.is_dir() else path.parent for path in paths)]
            (found,) = {folder / code for folder in folders if (folder / code).exists()}
            paths.append(found)
        elif re.fullmatch(r"[A-Za-z_.]+", code) and code != "capstan remove":
            names.append(code)
    assert paths
    assert all(path.exists() for path in paths)
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*.py")))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    missing = [name for name in names if not re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", text)]
    assert not missing
