"""Links in a source from elsewhere: its texts must not become captions of files of this machine."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from source_files import recipe, rows

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source import SourceReader

SECRET = "-----BEGIN PRIVATE KEY-----"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An image folder `photos`, next to a file that is nobody's business."""
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret.json").write_text(json.dumps({"caption": SECRET}))
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("1.jpg", "2.jpg", "sub/3.jpg"):
        (folder / name).write_bytes(b"\xff\xd8")
    return folder


@pytest.mark.parametrize("name", ["1.txt", "1.caption", "1.TXT", "1.jpg.txt", "sub/3.txt"])
@pytest.mark.parametrize("how", ["absolute", "relative", "by a second link", "through a folder"])
def test_a_caption_that_links_out_is_not_read(
    photos: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    link, target = photos / name, photos.parent / "secret"
    if how == "absolute":
        link.symlink_to(target)
    elif how == "relative":
        link.symlink_to(os.path.relpath(target, link.parent))
    elif how == "by a second link":
        (photos / "inner").symlink_to(target)
        link.symlink_to(photos / "inner")
    else:
        (photos / "up").symlink_to(photos.parent)
        link.symlink_to(photos / "up" / "secret")
    with caplog.at_level(logging.WARNING):
        reader = SourceReader(recipe(photos, format="folder"))
        found = [row for table in reader.tables() for row in table.to_pylist()]
    assert SECRET not in json.dumps([{**row, "key": ""} for row in found], default=str)
    assert len(found) == 3
    assert reader.unused["links out of the folder"] >= 1
    assert f"links to texts outside {photos} are not read" in caplog.text
    assert caplog.text.count("are not read") == 1


def test_fields_and_tables_that_link_out_are_not_read(photos: Path) -> None:
    (photos / "1.json").symlink_to(photos.parent / "secret.json")
    (photos / "metadata.jsonl").symlink_to(photos.parent / "secret.json")
    assert SECRET not in json.dumps(rows(photos, format="folder"), default=str)
    tables = photos.parent / "tables"
    tables.mkdir()
    for suffix in ("csv", "tsv", "jsonl", "txt", "txt.gz", "log"):
        (tables / f"a.{suffix}").symlink_to(photos.parent / "secret")
    with pytest.raises(RecipeError):
        rows(tables)
    with pytest.raises(RecipeError):
        rows(tables / "*.txt")


def test_links_within_the_folder_and_a_file_that_the_user_names_are_read(photos: Path, tmp_path: Path) -> None:
    (photos / "texts").mkdir()
    (photos / "texts" / "a").write_text("within")
    (photos / "1.txt").symlink_to("texts/a")
    assert [row["caption"] for row in rows(photos, format="folder") if row["url"].endswith("1.jpg")] == ["within"]
    (tmp_path / "real.txt").write_text("http://example.org/1.jpg\n")
    (tmp_path / "named.txt").symlink_to("real.txt")
    assert [row["url"] for row in rows(tmp_path / "named.txt")] == ["http://example.org/1.jpg"]
    (tmp_path / "link-to-photos").symlink_to(photos)
    assert "within" in [row["caption"] for row in rows(tmp_path / "link-to-photos", format="folder")]


def _cache(hub: Path, repository: str) -> Path:
    """A snapshot as Hugging Face's cache has it: every file is a link to a blob that is named by its hash."""
    snapshot = hub / repository / "snapshots" / "0123abc"
    (hub / repository / "blobs").mkdir(parents=True)
    (snapshot / "train").mkdir(parents=True)
    for name, content in (("1.jpg", b"\xff\xd8"), ("1.txt", b"from the hub"), ("metadata.jsonl", b"")):
        blob = hub / repository / "blobs" / f"{abs(hash(name)):x}"
        blob.write_bytes(content)
        (snapshot / "train" / name).symlink_to(f"../../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("named", ["snapshots/0123abc", "snapshots/0123abc/train", "snapshots", ""])
def test_hugging_faces_cache_is_read(tmp_path: Path, named: str) -> None:
    repository = _cache(tmp_path / "hub", "datasets--someone--photos").parents[1]
    found = rows(repository / named, format="folder")
    assert [row["caption"] for row in found] == ["from the hub"]


@pytest.mark.parametrize("name", ["datasets--someone--photos", "photos"])
def test_a_cache_is_no_way_out(tmp_path: Path, name: str) -> None:
    """Neither a link next to the blobs, nor a folder that only has a folder `snapshots`, nor another's blobs."""
    (tmp_path / "secret").write_text(SECRET)
    snapshot = _cache(tmp_path / "hub", name)
    other = _cache(tmp_path / "hub", "datasets--other--private")
    text = snapshot / "train" / "1.txt"
    for target in (tmp_path / "secret", other / "train" / "1.txt", *(other.parents[1] / "blobs").iterdir()):
        text.unlink()
        text.symlink_to(target)
        assert [row["caption"] for row in rows(snapshot, format="folder")] == [""]
