"""Links inside a dataset: never followed, refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capstan.pipeline import build as stages
from capstan.pipeline.config import Blocklist, Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.lease import HeldLease, lease
from capstan.pipeline.storage import Storage


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder outside the dataset whose files must stay."""
    folder = tmp_path / "precious"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "b.txt").write_text("b")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("link", ["staged", "staged/x", "staged/x/y", "state/ingest-0"])
def test_links_are_neither_listed_nor_followed(tmp_path: Path, precious: Path, link: str) -> None:
    storage = Storage(str(tmp_path / "ds"))
    storage.write("staged/own.tar", b"own")
    path = tmp_path / "ds" / link
    if link == "staged":
        (tmp_path / "ds" / "staged" / "own.tar").unlink()
        path.rmdir()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(precious)
    for folder in ("", "staged", "state", link):
        storage.delete(*storage.names(folder))
    assert files(precious) == ["a.txt", "deep/b.txt"]
    assert storage.links() == [link]


def test_a_link_to_a_file_and_a_loop_are_left_alone(tmp_path: Path, precious: Path) -> None:
    storage = Storage(str(tmp_path / "ds"))
    storage.write("state/kept", b"kept")
    (tmp_path / "ds" / "secret").symlink_to(precious / "a.txt")
    (tmp_path / "ds" / "state" / "loop").symlink_to(tmp_path / "ds")
    assert storage.names() == ["state/kept"]
    assert storage.links() == ["secret", "state/loop"]


def test_a_dataset_that_is_a_link_itself_is_listed(tmp_path: Path) -> None:
    Storage(str(tmp_path / "real")).write("state/a", b"a")
    (tmp_path / "ds").symlink_to(tmp_path / "real")
    storage = Storage(str(tmp_path / "ds"))
    assert storage.names() == storage.names("state") == ["state/a"]
    with lease(storage, "build"):
        pass


@pytest.mark.parametrize("command", ["build", "select", "score", "remove", "recaption"])
def test_commands_that_write_name_the_link(tmp_path: Path, precious: Path, command: str) -> None:
    dataset = tmp_path / "ds"
    (dataset / "staged").mkdir(parents=True)
    (dataset / "staged" / "x").symlink_to(precious)
    recipe = Recipe.model_validate({"dataset": str(dataset), "score": {"image": {}}})
    commands: dict[str, Callable[[], object]] = {
        "build": lambda: stages.build(recipe, progress=False),
        "select": lambda: stages.select(recipe, progress=False),
        "score": lambda: stages.score(recipe, progress=False),
        "remove": lambda: stages.remove(str(dataset), Blocklist(), progress=False),
        "recaption": lambda: HeldLease(Storage(str(dataset)), "recaption", "captions/x").take(),
    }
    with pytest.raises(RecipeError, match=r"staged/x is a link, and links inside a dataset are not followed"):
        commands[command]()
    assert files(precious) == ["a.txt", "deep/b.txt"]
