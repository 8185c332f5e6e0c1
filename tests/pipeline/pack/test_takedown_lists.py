"""Lists of what to take down that cannot be read."""

from pathlib import Path

import pytest

from capstan.pipeline import build
from capstan.pipeline.config import Blocklist
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage


@pytest.mark.parametrize(
    ("lists", "entry", "message"),
    [
        ("keys", "12", "--keys: .*line 3: '12' is not a key"),
        ("sha256", "zz", "--sha256: .*is not a SHA-256"),
        ("domains", "not a domain", "--domains: .*is not a domain"),
        ("urls", "", "remove: names no entry"),
    ],
)
def test_a_bad_list_changes_nothing(tmp_path: Path, lists: str, entry: str, message: str) -> None:
    file = tmp_path / "list.txt"
    file.write_text(f"# a comment\n\n{entry}\n")
    with pytest.raises(RecipeError, match=message):
        build.remove(str(tmp_path / "dataset"), Blocklist(**{lists: str(file)}), progress=False)
    assert Storage(str(tmp_path / "dataset")).names() == []


def test_a_list_that_is_not_there_names_its_option(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--urls: no file at"):
        build.remove(str(tmp_path), Blocklist(urls=str(tmp_path / "none.txt")), progress=False)
