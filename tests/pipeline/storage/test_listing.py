"""A user's files on a disk: links are followed, nothing is lost without a word, and no folder is held as a whole."""

import logging
import tracemalloc
from pathlib import Path

import pytest
from source_files import recipe, rows, urls_and_captions

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source import SourceReader
from capstan.pipeline.storage import find_files, listing


def names(path: Path, *parts: str) -> list[str]:
    return [file.path.removeprefix(f"{path}/") for file in find_files(str(path.joinpath(*parts)), {})]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder of images as a cache makes them: links to files and folders elsewhere."""
    (tmp_path / "blobs" / "more" / "deep").mkdir(parents=True)
    (tmp_path / "blobs" / "x").write_bytes(b"a linked image")
    (tmp_path / "blobs" / "more" / "c.jpg").write_bytes(b"c")
    (tmp_path / "blobs" / "more" / "deep" / "d.jpg").write_bytes(b"d")
    images = tmp_path / "pictures"
    images.mkdir()
    (images / "a.jpg").symlink_to("../blobs/x")
    (images / "b.jpg").write_bytes(b"b")
    (images / "sub").symlink_to(tmp_path / "blobs" / "more")
    return images


def test_links_are_followed(linked: Path) -> None:
    assert names(linked) == ["a.jpg", "b.jpg", "sub/c.jpg", "sub/deep/d.jpg"]
    assert names(linked, "*.jpg") == ["a.jpg", "b.jpg"]
    assert names(linked, "*", "*.jpg") == ["sub/c.jpg"]
    assert names(linked, "**", "*.jpg") == ["a.jpg", "b.jpg", "sub/c.jpg", "sub/deep/d.jpg"]
    assert names(linked, "[ab].*") == names(linked, "?.jpg") == ["a.jpg", "b.jpg"]
    assert [file.size for file in find_files(str(linked / "a.jpg"), {})] == [14]
    assert [row["length"] for row in rows(linked)] == [14, 1, 1, 1]


def test_links_that_lead_back_or_nowhere_are_logged(linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    (linked / "sub" / "deep" / "back").symlink_to(linked)
    (linked / "itself").symlink_to("itself")
    (linked / "lost.jpg").symlink_to("gone.jpg")
    with caplog.at_level(logging.WARNING):
        found = names(linked)
    assert found == ["a.jpg", "b.jpg", "itself", "lost.jpg", "sub/c.jpg", "sub/deep/d.jpg"]
    assert "sub/deep/back links to a folder above it" in caplog.text
    assert [row["length"] for row in rows(linked) if row["file"].endswith("lost.jpg")] == [0]


@pytest.mark.parametrize("glob", ["a**b/*.jpg", "none/*.jpg", "pictures/*.gif"])
def test_a_glob_that_finds_nothing(linked: Path, glob: str) -> None:
    with pytest.raises(RecipeError, match=r"source\.path: "):
        find_files(f"{linked.parent}/{glob}", {})


def test_what_shares_a_name_is_listed_together_however_large_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_MOST", 3)
    for n in range(20):
        (tmp_path / f"{n}.jpg").touch()
        (tmp_path / f"{n}.txt").write_text(f"{n}")
        (tmp_path / f"{n}-small.txt").touch()
    sizes = [len(some) for some in listing.walk(str(tmp_path))]
    assert sum(sizes) == 60
    assert max(sizes) < 5
    found = urls_and_captions(rows(tmp_path))
    assert sorted(int(caption) for _, caption in found) == list(range(20))
    assert all(url.endswith(f"/{caption}.jpg") for url, caption in found)


def test_a_source_of_many_folders_is_not_held(tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / f"{folder}").mkdir()
        for n in range(50):
            (tmp_path / f"{folder}" / f"{n}.jpg").touch()
    tracemalloc.start()
    whole = SourceReader(recipe(tmp_path))
    taken = sum(len(table) for table in whole.tables())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken == 1000
    assert held < 1000 * 100  # bytes an image: its path alone has as many


def test_a_link_to_a_folder_that_is_read_anyway_is_not_entered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`latest`, as many tools make it: each image would come twice, with two keys."""
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "a.jpg").write_bytes(b"a")
    (tmp_path / "latest").symlink_to("v1")
    assert names(tmp_path) == ["v1/a.jpg"]
    assert "latest links to a folder that is read anyway" in caplog.text
    assert names(tmp_path / "latest") == ["a.jpg"]
