"""Which columns reach `extra`: all but vectors, or what source.columns names."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import CAPTIONS, URLS, rows, write_tar

from capstan.pipeline.errors import RecipeError

VECTOR = [n / 7 for n in range(768)]
FIELDS: dict[str, Any] = {"width": 3, "tag_a": "x", "tag_b": "y", "box": [1.0, 2.0], "clip_emb": VECTOR}


def write(path: Path) -> None:
    match path.suffix:
        case ".parquet":
            columns = {name: [value] * 3 for name, value in FIELDS.items() if name != "clip_emb"}
            fixed = pa.array([VECTOR] * 3, pa.list_(pa.float32(), 768))
            table = pa.table({"url": URLS, "caption": CAPTIONS, **columns, "clip_emb": [VECTOR] * 3, "fixed": fixed})
            pq.write_table(table, path, row_group_size=2)
        case ".jsonl":
            lines = [{"url": url, "caption": text, **FIELDS} for url, text in zip(URLS, CAPTIONS, strict=True)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        case ".csv":
            path.write_text(
                "url,caption,width,tag_a,tag_b\n" + "".join(f"{url},x,3,x,y\n" for url in URLS) + "http://r/\n"
            )
        case _:
            write_tar(path, [("0.jpg", b"JPEG"), ("0.json", json.dumps({"caption": "x", **FIELDS}).encode())])


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.tar"])
def test_vectors_are_left_out_and_said_so(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / name)
    assert {*json.loads(rows(tmp_path / name)[0]["extra"])} == {"width", "tag_a", "tag_b", "box"}
    assert caplog.text.count("the vectors in column clip_emb are not carried") == 1


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.csv", "t.tar"])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("all", {*FIELDS, "fixed"}),
        ([], set()),
        (["width"], {"width"}),
        (["tag_*", "!tag_b"], {"tag_a"}),
        (["!tag_*"], {"width", "box"}),
        (["!*", "tag_?"], {"tag_a", "tag_b"}),
        (["*_emb", "width"], {"width", "clip_emb"}),
    ],
)
def test_columns_by_name_and_glob(tmp_path: Path, name: str, columns: Any, expected: set[str]) -> None:
    write(tmp_path / name)
    there = {"t.csv": {"width", "tag_a", "tag_b"}, "t.parquet": {*FIELDS, "fixed"}}.get(name, {*FIELDS})
    for row in rows(tmp_path / name, columns=columns):
        assert {*json.loads(row["extra"])} == expected & there


def test_a_checksum_that_is_not_carried_is_still_read(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"url": URLS, "caption": CAPTIONS, "sha": ["a", "b", "c"], "n": [1, 2, 3]}), tmp_path / "t.parquet"
    )
    found = rows(tmp_path / "t.parquet", hash="sha", columns=["n"])
    assert [row["hash"] for row in found] == ["a", "b", "c"]
    assert [row["extra"] for row in found] == ['{"n":1}', '{"n":2}', '{"n":3}']


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_a_column_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    with pytest.raises(RecipeError, match=r"source\.columns: no column 'widht' in .*did you mean width"):
        rows(tmp_path / name, columns=["widht", "none_*"])


def test_rows_that_will_fail_keep_their_marks(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"url": "http://a/", "caption": ["x", "y"], "n": 1}\nno json\n')
    extras = [json.loads(row["extra"]) for row in rows(tmp_path / "t.jsonl", columns=[])]
    assert extras == [{"unreadable_caption": ["x", "y"]}, {"unreadable_line": "no json"}]
