"""Columns and files of another type than expected: read where the meaning is plain, else refused before any row."""

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import CAPTIONS, URLS, rows, urls_and_captions

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source import tables
from capstan.pipeline.storage import Storage, find_files

IMAGES = [b"GIF89a one", b"two", b"three"]
BASE64 = [base64.b64encode(image).decode() for image in IMAGES]
CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([[{"bytes": image, "path": None}] for image in IMAGES], pa.list_(CELL)),
        pa.array([[image] for image in IMAGES], pa.large_list(pa.binary())),
        pa.array(BASE64),
        pa.array([text.rstrip("=") for text in BASE64]).dictionary_encode(),
        pa.array([f"data:image/gif;base64,{text}" for text in BASE64], pa.large_string()),
        pa.array([f"{text[:4]}\n{text[4:]}" for text in BASE64]),
    ],
    ids=["list of structs", "list of bytes", "base64", "unpadded base64", "data URIs", "wrapped base64"],
)
def test_images_whose_meaning_is_plain(tmp_path: Path, cells: pa.Array) -> None:
    found = rows(parquet(tmp_path / "t.parquet", image=cells, caption=CAPTIONS), image="image")
    assert [row["image"] for row in found] == IMAGES
    assert [row["caption"] for row in found] == CAPTIONS


@pytest.mark.parametrize(
    ("columns", "source", "message"),
    [
        (
            {"image": [[b"1", b"2"]] * 3},
            {"image": "image"},
            "source.image: .*list<.*with up to 2 items",
        ),
        ({"image": [1, 2, 3]}, {"image": "image"}, "source.image: .*holds int64, not images"),
        ({"image": [{"path": "x"}] * 3}, {"image": "image"}, "source.image: .*holds struct<path.*not images"),
        ({"image": URLS}, {"image": "image"}, "source.image: .*holds URLs.*set source.url: image"),
        ({"url": [1, 2, 3]}, {}, "source.url: .*holds int64, not text"),
        ({"url": [{"a": "b"}] * 3}, {}, "source.url: .*holds struct.*not text"),
        ({"url": [URLS[:2]] * 3}, {}, "source.url: .*with up to 2 items per row"),
        ({"url": URLS}, {"url": None}, "source.url: is null"),
    ],
)
def test_types_that_cannot_be_meant_are_named(
    tmp_path: Path, columns: dict[str, Any], source: dict[str, Any], message: str
) -> None:
    path = parquet(tmp_path / "t.parquet", caption=CAPTIONS, **columns)
    with pytest.raises(RecipeError, match=message):
        rows(path, **source)


def test_lists_of_one_url_and_caption(tmp_path: Path) -> None:
    columns = {"url": [[url] for url in URLS], "caption": [[text] if text else [] for text in CAPTIONS]}
    assert urls_and_captions(rows(parquet(tmp_path / "t.parquet", **columns))) == list(zip(URLS, CAPTIONS, strict=True))
    (tmp_path / "t.jsonl").write_text(json.dumps({"url": URLS[:1], "caption": ["one"]}))
    assert urls_and_captions(rows(tmp_path / "t.jsonl")) == [(URLS[0], "one")]


def test_no_url_where_images_are_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", image=IMAGES, caption=CAPTIONS, url=URLS)
    found = rows(path, image="image", url=None)
    assert [row["image"] for row in found] == IMAGES
    assert {row["url"] for row in found} == {""}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("block", [7, 64, 1 << 20])
def test_a_json_array_is_read_as_its_items(
    tmp_path: Path, indent: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", block)
    records = [{"url": url, "caption": text, "n": {"a": [1, "],{"]}} for url, text in zip(URLS, CAPTIONS, strict=True)]
    (tmp_path / "t.jsonl").write_text("\ufeff" + json.dumps([*records, 7], indent=indent) + "\n")
    found = rows(tmp_path / "t.jsonl")
    assert urls_and_captions(found) == [*zip(URLS, CAPTIONS, strict=True), ("", "")]
    assert json.loads(found[0]["extra"]) == {"n": {"a": [1, "],{"]}}
    assert json.loads(found[3]["extra"]) == {"unreadable_line": "7"}


def test_a_cut_json_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps([{"url": url} for url in URLS])[:-9])
    with pytest.raises(RecipeError, match=r"source\.path: .*t\.jsonl is a JSON array that is cut or damaged"):
        rows(tmp_path / "t.jsonl", caption="url")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.txt"])
def test_utf16_is_named(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / name).write_bytes("url,caption\nhttp://a/,one\n".encode(encoding))
    with pytest.raises(RecipeError, match=rf"source\.path: .*{name} is UTF-16, not UTF-8.*iconv"):
        rows(tmp_path / name)


def test_files_without_rows_stop_nothing(tmp_path: Path) -> None:
    parquet(tmp_path / "0.parquet", url=URLS, caption=CAPTIONS)
    parquet(tmp_path / "1.parquet")
    parquet(tmp_path / "2.parquet", url=pa.array([], pa.int64()), caption=pa.array([], pa.list_(pa.string())))
    assert len(rows(tmp_path)) == 3


@pytest.mark.parametrize("name", ["b.parquet", "b.csv"])
def test_all_tables_are_checked_before_the_first_row(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = name.rpartition(".")[2]
    for first in ("a", "b"):
        header = {"url": URLS, "caption": CAPTIONS} if first == "a" else {"url": URLS, "text": CAPTIONS}
        if kind == "parquet":
            parquet(tmp_path / f"{first}.parquet", **header)
        else:
            (tmp_path / f"{first}.csv").write_text(",".join(header) + "\nhttp://a/,x\n")
    monkeypatch.setattr(tables, "_with_urls", lambda *_: pytest.fail("a row was read"))
    with pytest.raises(RecipeError, match=rf"source\.caption: no column 'caption' in .*{name}"):
        rows(tmp_path)


@pytest.mark.parametrize("where", ["disk", "memory://brackets"])
def test_globs_in_folders_with_brackets(tmp_path: Path, where: str) -> None:
    storage = Storage(str(tmp_path) if where == "disk" else where)
    for name in ("[D] a/x [1]/t.txt", "[D] a/y/t.txt", "D/y/t.txt"):
        storage.write(name, b"http://a/\n")
    base = storage.url
    assert [file.path.rpartition("/[D] a/")[2] for file in find_files(f"{base}/[D] a/*/*.txt", {})] == [
        "x [1]/t.txt",
        "y/t.txt",
    ]
    assert len(find_files(f"{base}/[D] a/x [1]/*.txt", {})) == 1
    assert len(find_files(f"{base}/[A-Z]/**/*.txt", {})) == 1
