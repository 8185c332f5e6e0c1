"""Rows from every kind of source, where their images lie, and the errors that name the field."""

import base64
import gzip
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import CAPTIONS, MEMBERS, URLS, packed, recipe, rows, urls_and_captions, write_table, write_tar

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.records import PLAN_SCHEMA, make_key
from capstan.pipeline.source import SourceReader, tables
from capstan.pipeline.source.columns import as_objects, of_urls, to_json
from capstan.pipeline.world.scene import draw_scene, vocabulary


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.tsv", "t.jsonl"])
def test_tables(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name)
    found = rows(tmp_path / name)
    assert urls_and_captions(found) == list(zip(URLS, CAPTIONS, strict=True))
    assert all(row["image"] is None and row["file"] == row["hash"] == "" for row in found)
    assert [row["key"] for row in found] == [make_key(url, text) for url, text in zip(URLS, CAPTIONS, strict=True)]


@pytest.mark.parametrize("how", ["gz", "zst", "bz2", "xz"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.txt"])
def test_packed_text(tmp_path: Path, name: str, how: str) -> None:
    write_table(tmp_path / name)
    assert rows(packed(tmp_path / name, how)) == rows(tmp_path / name) != []


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
    for name in ("a.jsonl", "sub/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_table(tmp_path / name)
    assert len(rows(tmp_path)) == len(rows(tmp_path / "**")) == 6
    assert len(rows(tmp_path / "*.jsonl")) == 3
    write_table(tmp_path / "c.parquet")
    twice = [str(tmp_path / name) for name in ("a.jsonl", "**/*.jsonl", "c.parquet")]
    where = Recipe.model_validate({"dataset": "unused", "source": {"path": twice}})
    assert sum(len(table) for table in SourceReader(where).tables()) == 9  # a file that is named twice is read once


ODD = 'quote " backslash \\ newline \n tab \t nul \x00 é 🎨'


def test_other_columns_become_json_that_reads_back(tmp_path: Path) -> None:
    columns = {
        "text": [ODD, None, ""],
        "whole": [1, None, -(2**62)],
        "part": [0.1, math.nan, 1e300],
        "yes": [True, None, False],
        "list": [[1.5, math.inf], None, []],
        "object": [{"b": 1, "a": "x"}, None, {"b": None, "a": "y"}],
        "bytes": [b"\xff\x00", None, b""],
        "none": [None, None, None],
    }
    pq.write_table(pa.table({"url": URLS, "caption": CAPTIONS, **columns}), tmp_path / "t.parquet")
    found = [json.loads(row["extra"]) for row in rows(tmp_path / "t.parquet")]
    wanted = [{name: cells[n] for name, cells in columns.items()} for n in range(3)]
    wanted[0] |= {"bytes": base64.b64encode(b"\xff\x00").decode(), "list": [1.5, None]}
    wanted[1]["part"] = None
    wanted[2]["bytes"] = ""
    assert found == wanted
    assert [list(row) for row in found] == [sorted(columns)] * 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=6))
def test_columns_give_what_single_rows_give(cells: list[tuple[str, str]]) -> None:
    left, right = (pa.array([cell[side] for cell in cells], pa.string()) for side in (0, 1))
    keys = of_urls(left, right, as_objects({}, len(cells)), right)["key"].to_pylist()
    assert keys == [make_key(url, text) if url else make_key("row", text, "{}") for url, text in cells]
    objects = as_objects({"b": left, "a": right}, len(cells)).to_pylist()
    assert objects == [to_json({"b": first, "a": second}) for first, second in cells]


def test_lines_of_csv_that_are_too_short_or_too_long_are_rows(tmp_path: Path) -> None:
    lines = ["url,caption,n", "http://a/,short", 'http://b/,"two\nlines",2', "http://c/,long,3,4,5", "http://d/,d,6"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    found = {row["url"]: (row["caption"], json.loads(row["extra"])) for row in rows(tmp_path / "t.csv")}
    assert found == {
        "http://a/": ("short", {"n": ""}),
        "http://b/": ("two\nlines", {"n": "2"}),
        "http://c/": ("long", {"n": "3"}),
        "http://d/": ("d", {"n": "6"}),
    }


def test_no_line_of_a_large_csv_is_lost_where_many_are_too_short(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", 2000)
    lines = [f"http://a/{n}" if n % 3 == 0 or n > 9000 else f"http://a/{n},x" for n in range(10_000)]
    (tmp_path / "t.csv").write_text("\n".join(["url,caption", *lines]))
    assert {row["url"] for row in rows(tmp_path / "t.csv")} == {f"http://a/{n}" for n in range(10_000)}


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_one_column_may_be_both_address_and_caption(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name)
    assert urls_and_captions(rows(tmp_path / name, caption="url")) == [(url, url) for url in URLS]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.txt"])
def test_text_that_is_not_utf8_loses_only_its_odd_letters(tmp_path: Path, name: str) -> None:
    content = {
        "t.csv": b"\xef\xbb\xbfurl,caption\r\nhttp://a/\xff,x\r\nhttp://b/,\xe9t\xe9\r\n\xff\r\n",
        "t.jsonl": b'{"url": "http://a/\xff", "caption": "x"}\n{"url": "http://b/", "caption": "\xe9t\xe9"}\n',
        "t.txt": b"\xef\xbb\xbfhttp://a/\xff\r\nhttp://b/\r\n",
    }
    (tmp_path / name).write_bytes(content[name])
    found = rows(tmp_path / name)
    assert [row["url"] for row in found] == ["http://a/\ufffd", "http://b/", "\ufffd"][: 3 if name == "t.csv" else 2]


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    wrong = pa.array([b"http://a/\xff", b"http://b/", None], pa.binary())
    text = pa.StringArray.from_buffers(3, *wrong.buffers()[1:], wrong.buffers()[0])
    columns = {"url": text, "caption": CAPTIONS, "other": text}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = rows(tmp_path / "t.parquet")
    assert [row["url"] for row in found] == ["http://a/\ufffd", "http://b/", ""]
    assert json.loads(found[0]["extra"]) == {"other": "http://a/\ufffd"}


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_text_of_any_arrow_type(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {name: pa.array(cells, pa.string()).cast(kind) for name, cells in [("url", URLS), ("caption", CAPTIONS)]}
    pq.write_table(pa.table({**columns, "other": columns["url"]}), tmp_path / "t.parquet")
    found = rows(tmp_path / "t.parquet")
    assert urls_and_captions(found) == list(zip(URLS, CAPTIONS, strict=True))
    assert [json.loads(row["extra"])["other"] for row in found] == URLS


def test_columns_that_are_not_text_are_written_as_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [b"1", b"2", None], "caption": [0.5, None, 1.0]}), tmp_path / "t.parquet")
    assert urls_and_captions(rows(tmp_path / "t.parquet")) == [("1", "0.5"), ("2", ""), ("", "1.0")]


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        (pa.list_(pa.string()), ["one", "two"]),
        (pa.list_(pa.string(), 2), ["one", "two"]),
        (pa.struct([("en", pa.string())]), {"en": "one"}),
        (pa.map_(pa.string(), pa.string()), [("en", "one")]),
    ],
)
@pytest.mark.parametrize("image", [None, "image"])
def test_a_caption_column_that_is_no_text_is_refused(
    tmp_path: Path, kind: pa.DataType, cell: Any, image: str | None
) -> None:
    columns = {"url": URLS[:1], "image": [b"x"], "caption": pa.array([cell], kind)}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(
        RecipeError,
        match=r"source\.caption: 'caption' in .*t\.parquet holds .*(, not text|items per row).*name a column",
    ):
        rows(tmp_path / "t.parquet", image=image)


def test_captions_in_json_that_are_no_text_are_rows_that_will_fail(tmp_path: Path) -> None:
    captions = ["text", 1.5, None, ["one", "two"], {"en": "one"}, [3], True]
    lines = [json.dumps({"url": "http://a/", "caption": caption, "n": 1}) for caption in captions]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    found = rows(tmp_path / "t.jsonl")
    assert [row["caption"] for row in found[:3]] == ["text", "1.5", ""]
    assert [row["extra"] for row in found[:3]] == ['{"n":1}'] * 3
    assert [json.loads(row["extra"])["unreadable_caption"] for row in found[3:]] == captions[3:]
    assert len({row["key"] for row in found}) == len(found)


SHA1 = "2fd4e1c67a2d28fced849ee1bb76e7391b93eb12"


@pytest.mark.parametrize("name", ["text.parquet", "bytes.parquet", "t.csv", "t.jsonl"])
def test_the_hash_column_is_read_and_stays_with_the_others(tmp_path: Path, name: str) -> None:
    cells: list[Any] = [bytes.fromhex(SHA1), None] if name.startswith("bytes") else [SHA1, None]
    table = pa.table({"url": URLS[:2], "caption": CAPTIONS[:2], "sha1": cells})
    match (tmp_path / name).suffix:
        case ".parquet":
            pq.write_table(table, tmp_path / name)
        case ".csv":
            (tmp_path / name).write_text(f"url,caption,sha1\nhttp://a/,x,{SHA1}\nhttp://b/,y,\n")
        case ".jsonl":
            (tmp_path / name).write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    found = rows(tmp_path / name, hash="sha1")
    assert [row["hash"] for row in found] == [SHA1, ""]
    assert "sha1" in json.loads(found[0]["extra"])


def test_a_line_that_is_not_json_is_a_row_that_will_fail(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"url": "http://a/", "caption": "x"}\n{"url": cut\n[1]\n')
    found = rows(tmp_path / "t.jsonl")
    assert urls_and_captions(found) == [("http://a/", "x"), ("", ""), ("", "")]
    assert len({row["key"] for row in found}) == 3


@pytest.mark.parametrize("struct", [False, True])
def test_embedded_bytes(tmp_path: Path, struct: bool) -> None:
    images: list[Any] = [b"one", b"two", None]
    cells = [{"bytes": image, "path": "x.png"} for image in images] if struct else images
    pq.write_table(pa.table({"image": cells, "caption": CAPTIONS, "n": [1, 2, 3]}), tmp_path / "t.parquet")
    found = rows(tmp_path / "t.parquet", image="image")
    assert [row["image"] for row in found] == [b"one", b"two", b""]
    assert [row["caption"] for row in found] == CAPTIONS
    assert found[0]["key"] == make_key("image", b"one", CAPTIONS[0])
    assert json.loads(found[0]["extra"]) == {"n": 1} | ({"image": {"path": "x.png"}} if struct else {})


def test_memory_does_not_grow_with_a_large_row_group(tmp_path: Path) -> None:
    """One row group of 200 MB of images, read in tables that hold a few."""
    cells = [bytes([n]) * (1 << 20) for n in range(200)]
    pq.write_table(
        pa.table({"image": cells, "caption": ["x"] * 200}),
        tmp_path / "t.parquet",
        use_dictionary=False,
        compression="none",
        write_batch_size=4,  # or else all of it is one page, which must be read whole
    )
    del cells
    pa.default_memory_pool().release_unused()
    start, most = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    for table in SourceReader(recipe(tmp_path / "t.parquet", image="image")).tables():
        assert table.schema == PLAN_SCHEMA
        most = max(most, pa.total_allocated_bytes())
    _, in_python = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most - start + in_python < 100 << 20


def test_an_address_in_a_table_never_names_a_local_file(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"url": ["/etc/passwd", "file:///etc/passwd"], "caption": ["", ""]}), tmp_path / "t.parquet"
    )
    assert [row["file"] for row in rows(tmp_path / "t.parquet")] == ["", ""]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "none.parquet"}, "source.path: no file at"),
        ({"path": "none*.csv"}, "source.path: no file at .*glob"),
        ({"path": "t.parquet", "url": "URI"}, "source.url: no column 'URI'.*did you mean url"),
        ({"path": "t.parquet", "caption": "captoin"}, "source.caption: .*did you mean caption"),
        ({"path": "t.parquet", "image": "image"}, "source.image: no column 'image'"),
        ({"path": "t.parquet", "hash": "sha256"}, "source.hash: no column 'sha256'"),
        ({"path": "t.jsonl", "hash": "sha256"}, "source.hash: no column 'sha256'"),
        ({"path": "t.csv", "url": "uri"}, "source.url: no column 'uri'.*did you mean url"),
        ({"path": "t.csv", "image": "image"}, "source.image: .*cannot hold embedded images.*Parquet"),
        ({"path": "empty.csv"}, "source.url: no column 'url'"),
        ({"path": "t.xyz"}, "source.format: cannot tell the format"),
        ({"path": "t.xyz", "format": "parquet"}, "source.path: .*is not Parquet"),
        ({"path": "cut.parquet"}, "source.path: .*cut.parquet"),
        ({"path": "t.xyz", "format": "webdataset"}, "source.path: .*is not a tar"),
        ({"path": "t.tar.gz"}, "source.path: .*is compressed.*gunzip t.tar.gz"),
        ({"path": "t.tgz"}, "source.path: .*is compressed.*gunzip t.tgz"),
        ({"path": "cut.tar"}, "source.path: .*cut.tar is not a tar, or is cut"),
        ({"path": "cut.csv.gz"}, "source.path: .*cut.csv.gz cannot be read.*check that it is complete"),
        ({"path": "cut.jsonl.zst"}, "source.path: .*cut.jsonl.zst cannot be read.*check that it is complete"),
        ({"path": "cut.txt.xz"}, "source.path: .*cut.txt.xz cannot be read.*check that it is complete"),
        ({"path": "wrong.txt.gz"}, "source.path: .*wrong.txt.gz cannot be read.*check that it is complete"),
        ({"path": "quote.csv"}, "source.path: .*quote.csv has a cell of over .*quote that is not closed"),
        ({"path": "bare", "format": "folder"}, "source.path: no image at .*name a folder"),
    ],
)
def test_errors_name_the_field_and_the_fix(tmp_path: Path, source: dict[str, str], message: str) -> None:
    for name in ("t.parquet", "t.jsonl", "t.csv"):
        write_table(tmp_path / name)
    (tmp_path / "t.xyz").write_text("nothing in particular" * 100)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-100])
    (tmp_path / "quote.csv").write_text('url,caption\nhttp://a/,"never closed\n' + "http://b/,x\n" * 20_000)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "readme.md").write_text("no images here")
    for name in ("t.tar.gz", "t.tgz"):
        write_tar(tmp_path / name, MEMBERS, "w:gz")
    write_tar(tmp_path / "t.tar", [("1.jpg", b"x" * 5000), ("2.jpg", b"x" * 5000)])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "t.tar").read_bytes()[:7000])
    (tmp_path / "wrong.txt.gz").write_text("not gzip")
    for name, how in [("t.csv", "gz"), ("t.jsonl", "zst"), ("t.xyz", "xz")]:
        whole = packed(tmp_path / name, how)
        target = whole.name.replace("t.", "cut.", 1).replace("xyz", "txt")
        (tmp_path / target).write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(RecipeError, match=message):
        rows(tmp_path / source.pop("path"), **source)


def test_the_signature_changes_with_the_source(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("http://a/\n")
    before = SourceReader(recipe(tmp_path / "t.txt")).signature
    assert SourceReader(recipe(tmp_path / "t.txt")).signature == before
    (tmp_path / "t.txt").write_text("http://a/\nhttp://b/\n")
    assert SourceReader(recipe(tmp_path / "t.txt")).signature != before


def test_the_captioned_world() -> None:
    world = Recipe.model_validate({"dataset": "x", "source": {"format": "world", "world": {"scenes": 5}}})
    (table,) = SourceReader(world).tables()
    assert len(table) == 5
    scene = draw_scene(0, 3, vocabulary(world.source.world))
    extra = json.loads(table["extra"][3].as_py())
    assert (extra["world_index"], extra["background"]) == (3, scene.background)
    for found, thing in zip(extra["objects"], scene.things, strict=True):
        left, top, right, bottom = found["box"]
        assert (found["label"], found["colour"], found["size"]) == (thing.shape, thing.colour, thing.size)
        middle = ((left + right) / 2, (top + bottom) / 2, right - left)
        assert middle == pytest.approx((thing.x, thing.y, 2 * thing.r), abs=1e-3)


def test_of_two_columns_of_one_name_the_last_is_read(tmp_path: Path) -> None:
    columns = [pa.array(["https://x.org/a.jpg"]), pa.array([["a list"]]), pa.array(["the caption"])]
    pq.write_table(pa.table(columns, names=["url", "caption", "caption"]), tmp_path / "t.parquet")
    assert urls_and_captions(rows(tmp_path / "t.parquet")) == [("https://x.org/a.jpg", "the caption")]


QUOTES = [
    "plain",
    '"Hello" is what she said',
    '5" screen',
    '"an opening quote only',
    "next",
    'the "end"',
    '"all of it"',
]


def test_quotes_in_tsv_are_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = "".join(f"http://a/{n}\t{text}\n" for n, text in enumerate(QUOTES)) + 'http://a/7\t"ragged"\tmore\n'
    (tmp_path / "t.tsv").write_text(f"url\tcaption\n{lines}")
    assert [row["caption"] for row in rows(tmp_path / "t.tsv")] == [*QUOTES, '"ragged"']
    assert "1 cells of" in caplog.text
    assert "set source.quoted: true" in caplog.text


def test_quoting_by_the_recipe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.tsv").write_text('url\tcaption\nhttp://a/\t"two\r\nlines, a\ttab and a "" quote"\n')
    assert rows(tmp_path / "t.tsv", quoted=True)[0]["caption"] == 'two\r\nlines, a\ttab and a " quote'
    (tmp_path / "t.csv").write_text('url,caption\nhttp://a/,"raw"\n')
    assert rows(tmp_path / "t.csv", quoted=False)[0]["caption"] == '"raw"'
    assert rows(tmp_path / "t.csv")[0]["caption"] == "raw"


def test_line_breaks_in_quotes_survive_the_edge_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BLOCK_BYTES", 1000)
    texts = [f"{'x' * (n % 7)}one\r\ntwo\n\rthree\r\r\n\n" for n in range(500)]
    lines = "".join(f'http://a/{n},"{text}"\r\n' for n, text in enumerate(texts))
    for shift in range(8):
        (tmp_path / "t.csv").write_bytes(f"url,caption{'y' * shift}\r\n{lines}".encode())
        assert [row["caption"] for row in rows(tmp_path / "t.csv", caption=f"caption{'y' * shift}")] == texts


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.txt.gz", "t.csv.gz", "t.tsv.gz"])
def test_a_line_without_end_is_refused_in_bounded_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LINE_CHARACTERS", 3 << 20)
    (tmp_path / name).write_bytes(gzip.compress(b"x" * (200 << 20), 1))
    tracemalloc.start()
    try:
        with pytest.raises(RecipeError, match=r"source\.path: .*t\.\w+\.gz"):
            rows(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
