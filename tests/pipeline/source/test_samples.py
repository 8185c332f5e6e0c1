"""Captions and images by the names that real tars and folders use: each is read, refused, or counted."""

import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from source_files import recipe, rows, write_tar

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source import SourceReader
from capstan.pipeline.source.plan import plan, read_plan
from capstan.pipeline.storage import Storage

APPLE = b"\0\x05\x16\x07\0\x02\0\0Mac OS X        "


def members(*names: str) -> list[tuple[str, bytes]]:
    """Files whose content is their name; JSON files hold it as their caption."""
    return [
        (name, json.dumps({"caption": name}).encode() if name.endswith(".json") else name.encode()) for name in names
    ]


def read(path: Path, **source: Any) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(image's name, caption) of each row, and the counts of what was not used."""
    reader = SourceReader(recipe(path, **source))
    found = [row for table in reader.tables() for row in table.to_pylist()]
    return [(row["url"].rpartition("#" if "#" in row["url"] else "/")[2], row["caption"]) for row in found], dict(
        reader.unused
    )


@pytest.mark.parametrize(
    ("names", "expected", "unused"),
    [
        ("0.cap 0.img 1.cap 1.img", [("0.img", "0.cap"), ("1.img", "1.cap")], {}),
        ("0.caption 0.jpg", [("0.jpg", "0.caption")], {}),
        ("0.caption.txt 0.image.jpg 0.json", [("0.image.jpg", "0.caption.txt")], {}),
        ("0.image.jpg 0.json", [("0.image.jpg", "0.json")], {}),
        ("0.photo.PNG 0.description.TXT", [("0.photo.PNG", "0.description.TXT")], {}),
        ("0.depth.png 0.rgb.png 0.text.txt", [("0.rgb.png", "0.text.txt")], {".depth.png": 1}),
        ("0.jpg 0.0.txt 0.1.txt", [("0.jpg", "0.0.txt")], {".txt": 1}),
        ("0.jpg 0.long.txt 0.txt", [("0.jpg", "0.txt")], {".long.txt": 1}),
        ("0.jpg 0.png 0.txt", [("0.jpg", "0.txt")], {".png": 1}),
        ("0.0.jpg 0.1.jpg 0.txt", [("0.0.jpg", "0.txt"), ("0.1.jpg", "0.txt")], {}),
        ("0.0.jpg 0.0.txt 0.1.jpg 0.txt", [("0.0.jpg", "0.0.txt"), ("0.1.jpg", "0.txt")], {}),
        ("0.jpg 0.meta.json", [("0.jpg", "0.meta.json")], {}),
        ("0.jpg 0.cls 0.prompt", [("0.jpg", "")], {".cls": 1, ".prompt": 1}),
        ("v1/a.1.png v1/a.1.txt v1/a.2.png", [("v1/a.1.png", "v1/a.1.txt"), ("v1/a.2.png", "")], {}),
        ("img.v1_0.jpg img.v1_1.txt", [("img.v1_0.jpg", "")], {".txt": 1}),
        ("0.JPG 0.TXT", [("0.JPG", "0.TXT")], {}),
    ],
)
def test_members_of_a_tar(tmp_path: Path, names: str, expected: list[tuple[str, str]], unused: dict[str, int]) -> None:
    write_tar(tmp_path / "t.tar", members(*names.split()))
    assert read(tmp_path / "t.tar") == (expected, unused)


def test_files_that_macos_adds_are_passed_over(tmp_path: Path) -> None:
    mac = [
        ("./._0.jpg", APPLE),
        ("./0.jpg", b"0"),
        ("./._0.txt", APPLE),
        ("./0.txt", b"zero"),
        ("__MACOSX/._1.jpg", APPLE),
    ]
    write_tar(tmp_path / "t.tar", mac)
    assert read(tmp_path / "t.tar") == ([("./0.jpg", "zero")], {})
    for name, data in mac:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    assert read(tmp_path / "folder") == ([("0.jpg", "zero")], {})


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
@pytest.mark.parametrize("name", ["1.jpg", "0.txt"])
def test_a_sample_that_is_a_link_is_refused_by_name(tmp_path: Path, kind: bytes, name: str) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"JPEG"))
        link = tarfile.TarInfo(name)
        link.type, link.linkname = kind, "0.jpg"
        tar.addfile(link)
    with pytest.raises(RecipeError, match=rf"source\.path: {name} in .*t\.tar is a link to 0\.jpg.*--hard-dereference"):
        rows(tmp_path / "t.tar")


def folder(path: Path, *names: str) -> Path:
    for name, data in members(*names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("names", "expected", "unused"),
    [
        ("a.jpg a.caption", [("a.jpg", "a.caption")], {}),
        ("a.jpg a.jpg.txt a-b.jpg a-b.txt", [("a-b.jpg", "a-b.txt"), ("a.jpg", "a.jpg.txt")], {}),
        ("a.jpg a.jpg.json", [("a.jpg", "a.jpg.json")], {}),
        ("a.jpg a.txt a.caption", [("a.jpg", "a.txt")], {".caption": 1}),
        ("a.jpg a.prompt b.txt", [("a.jpg", "")], {".prompt": 1, ".txt": 1}),
    ],
)
def test_captions_next_to_images(
    tmp_path: Path, names: str, expected: list[tuple[str, str]], unused: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capstan.pipeline.storage.listing._MOST", 1)  # files in a batch
    found, left = read(folder(tmp_path / "in", *names.split()))
    assert (sorted(found), left) == (expected, unused)


def write_metadata(path: Path, columns: dict[str, list[str]]) -> None:
    match path.suffix:
        case ".jsonl":
            lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        case ".csv":
            pyarrow.csv.write_csv(pa.table(columns), path)
        case _:
            pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_an_imagefolder_of_hugging_face(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    place = folder(tmp_path / "in", "train/a.jpg", "train/b.jpg", "train/c.jpg", "train/c.txt")
    names = ["train/a.jpg", "./train/c.jpg", "../../outside.jpg"]
    write_metadata(
        place / f"metadata.{kind}", {"file_name": names, "text": ["A", "not this", "lost"], "by": ["x", "y", "z"]}
    )
    with caplog.at_level(logging.WARNING):
        found = {row["url"].rpartition("/")[2]: row for row in rows(place, caption="text")}
    assert {name: row["caption"] for name, row in found.items()} == {"a.jpg": "A", "b.jpg": "", "c.jpg": "train/c.txt"}
    assert json.loads(found["a.jpg"]["extra"]) == {"by": "x"}
    assert "1 rows of metadata name no image" in caplog.text
    with pytest.raises(RecipeError, match=r"source\.caption: no column 'caption' in .*metadata.*it has: .*text"):
        rows(place)


def test_metadata_without_file_names_is_refused(tmp_path: Path) -> None:
    place = folder(tmp_path / "in", "a.jpg")
    write_metadata(place / "metadata.csv", {"name": ["a.jpg"], "caption": ["A"]})
    with pytest.raises(RecipeError, match=r"source\.path: no column 'file_name' in .*metadata\.csv"):
        rows(place)


def test_metadata_without_images_is_a_table(tmp_path: Path) -> None:
    write_metadata(tmp_path / "metadata.jsonl", {"url": ["http://a/"], "caption": ["A"]})
    assert [row["caption"] for row in rows(tmp_path)] == ["A"]


def test_the_plan_counts_captions_and_what_was_not_used(
    tmp_path: Path, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "t.tar", members("0.jpg", "0.prompt", "1.jpg", "1.prompt", "1.cls"))
    where = Recipe.model_validate({"dataset": storage.url, "source": {"path": str(tmp_path / "t.tar")}})
    with caplog.at_level(logging.WARNING):
        made = plan(where, storage, progress=False)
    message = "0 of 2 rows have a caption; 3 files or tar members (.prompt, .cls) were not used"
    assert made.coverage() == read_plan(storage).coverage() == message
    assert message in caplog.text
