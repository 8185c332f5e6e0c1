"""Rows from every kind of source, and the errors that name the field."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Recipe
from pipeline.errors import RecipeError
from pipeline.sources import Rows, read_bytes

URLS = [f"http://example.org/{n}.jpg" for n in range(3)]
CAPTIONS = ["a cat", "zwei Hunde, „groß“", ""]
TABLE = pa.table({"url": URLS, "caption": CAPTIONS, "width": [1, 2, None]})


def recipe(path: Path | str, **source: Any) -> Recipe:
    return Recipe.model_validate({"dataset": "unused", "source": {"path": str(path), **source}})


def rows(path: Path | str, **source: Any) -> list[dict[str, Any]]:
    return [row for table in Rows(recipe(path, **source)).tables() for row in table.to_pylist()]


def urls_and_captions(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["url"], row["caption"]) for row in found]


def write_table(path: Path) -> None:
    match path.name.partition(".")[2]:
        case "parquet":
            pq.write_table(TABLE, path, row_group_size=1)
        case "csv":
            path.write_text(
                "url,caption,width\n" + "".join(f'{u},"{c}",\n' for u, c in zip(URLS, CAPTIONS, strict=True))
            )
        case "tsv":
            path.write_text("url\tcaption\n" + "".join(f"{u}\t{c}\n" for u, c in zip(URLS, CAPTIONS, strict=True)))
        case "jsonl":
            path.write_text("\n".join(json.dumps(row) for row in TABLE.to_pylist()))
        case "jsonl.gz":
            path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in TABLE.to_pylist()).encode()))


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.tsv", "t.jsonl", "t.jsonl.gz"])
def test_tables(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name)
    found = rows(tmp_path / name)
    assert urls_and_captions(found) == list(zip(URLS, CAPTIONS, strict=True))
    assert all(row["image"] is None and row["file"] == "" for row in found)
    assert len({row["key"] for row in found}) == 3


def test_the_key_does_not_depend_on_the_format(tmp_path: Path) -> None:
    keys = set()
    for name in ("t.parquet", "t.tsv", "t.jsonl"):
        write_table(tmp_path / name)
        keys.add(tuple(row["key"] for row in rows(tmp_path / name)))
    assert len(keys) == 1


def test_other_columns_are_kept_as_json(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet")
    assert [json.loads(row["extra"]) for row in rows(tmp_path / "t.parquet")] == [
        {"width": 1},
        {"width": 2},
        {"width": None},
    ]


def test_text_lines_are_addresses(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join([*URLS, "", ""]))
    assert urls_and_captions(rows(tmp_path / "t.txt")) == [(url, "") for url in URLS]


def test_several_files_a_glob_and_a_folder_of_tables(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.jsonl"):
        write_table(tmp_path / name)
    assert len(rows(tmp_path)) == len(rows(tmp_path / "*")) == 6
    assert len(rows(tmp_path / "*.parquet")) == 3


def test_a_line_that_is_not_json_is_a_row_that_will_fail(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"url": "http://a/", "caption": "x"}\n{"url": cut\n[1]\n')
    found = rows(tmp_path / "t.jsonl")
    assert urls_and_captions(found) == [("http://a/", "x"), ("", ""), ("", "")]
    assert len({row["key"] for row in found}) == 3


@pytest.mark.parametrize("struct", [False, True])
def test_embedded_bytes(tmp_path: Path, struct: bool) -> None:
    images: list[Any] = [b"one", b"two", None]
    cells = [{"bytes": image, "path": "x"} for image in images] if struct else images
    pq.write_table(pa.table({"image": cells, "caption": CAPTIONS}), tmp_path / "t.parquet")
    found = rows(tmp_path / "t.parquet", image="image")
    assert [row["image"] for row in found] == [b"one", b"two", b""]
    assert [row["caption"] for row in found] == CAPTIONS


def test_a_folder_of_images_with_captions_beside_them(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"JPEG a")
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "sub" / "b.PNG").write_bytes(b"PNG")
    (tmp_path / "sub" / "b.json").write_text('{"caption": "a dog", "licence": "cc0"}')
    first, second = rows(tmp_path)
    assert (first["caption"], second["caption"]) == ("a cat", "a dog")
    assert second["extra"] == '{"licence":"cc0"}'
    assert read_bytes(first["file"], first["offset"], first["length"], recipe(tmp_path)) == b"JPEG a"


def test_webdataset_tars_are_read_in_place(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in [
            ("x/1.jpg", b"JPEG one"),
            ("x/1.txt", b"a cat"),
            ("2.webp", b"WEBP"),
            ("2.json", b'{"caption": "a dog", "n": 1}'),
            ("3.txt", b"no picture"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = rows(tmp_path / "t.tar")
    assert [row["caption"] for row in found] == ["a cat", "a dog"]
    where = [read_bytes(row["file"], row["offset"], row["length"], recipe(tmp_path)) for row in found]
    assert where == [b"JPEG one", b"WEBP"]
    assert found[1]["extra"] == '{"n":1}'


def test_an_address_in_a_table_never_names_a_local_file(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"url": ["/etc/passwd", "file:///etc/passwd"], "caption": ["", ""]}), tmp_path / "t.parquet"
    )
    assert [row["file"] for row in rows(tmp_path / "t.parquet")] == ["", ""]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "none.parquet"}, "source.path: no file at"),
        ({"path": "t.parquet", "url": "URI"}, "source.url: no column 'URI'.*did you mean url"),
        ({"path": "t.parquet", "caption": "captoin"}, "source.caption: .*did you mean caption"),
        ({"path": "t.parquet", "image": "image"}, "source.image: no column 'image'"),
        ({"path": "t.xyz"}, "source.format: cannot tell the format"),
        ({"path": "t.xyz", "format": "parquet"}, "source.path: .*is not Parquet"),
        ({"path": "t.xyz", "format": "webdataset"}, "source.path: .*is not an uncompressed tar"),
    ],
)
def test_errors_name_the_field_and_the_mend(tmp_path: Path, source: dict[str, str], message: str) -> None:
    write_table(tmp_path / "t.parquet")
    (tmp_path / "t.xyz").write_text("nothing in particular" * 100)
    with pytest.raises(RecipeError, match=message):
        rows(tmp_path / source.pop("path"), **source)


def test_the_signature_changes_with_the_source(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("http://a/\n")
    before = Rows(recipe(tmp_path / "t.txt")).signature
    assert Rows(recipe(tmp_path / "t.txt")).signature == before
    (tmp_path / "t.txt").write_text("http://a/\nhttp://b/\n")
    assert Rows(recipe(tmp_path / "t.txt")).signature != before


def test_the_captioned_world() -> None:
    world = Recipe.model_validate({"dataset": "x", "source": {"format": "world", "world": {"scenes": 5}}})
    (table,) = Rows(world).tables()
    assert len(table) == 5
    assert json.loads(table["extra"][3].as_py()) == {"world_index": 3}
