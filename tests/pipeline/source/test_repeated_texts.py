"""Parquet files that store a long text once for many rows: read in bounded memory, row by row the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capstan.pipeline.config import Recipe
from capstan.pipeline.source import table_checks, tables
from capstan.pipeline.source.reader import SourceReader
from capstan.pipeline.source.table_checks import rows_at_once

LONG = 1_000_000  # bytes of the text
DICTIONARY: dict[str, Any] = {}
PREFIXES = {"use_dictionary": False, "column_encoding": {"caption": "DELTA_BYTE_ARRAY", "url": "PLAIN"}}
PLAIN = {"use_dictionary": False}

GROWTH = """
import resource, sys
from capstan.pipeline.config import Recipe
from capstan.pipeline.source.reader import SourceReader
recipe = Recipe.model_validate({"dataset": "unused", "source": {"path": sys.argv[1]}})
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = rss()
rows = sum(len(table) for table in SourceReader(recipe).tables())
print(rows, rss() - before)
"""


def write(path: Path, texts: list[str], **settings: Any) -> Path:
    urls = [f"http://a.org/{number}.jpg" for number in range(len(texts))]
    pq.write_table(pa.table({"url": urls, "caption": texts}), path, **settings)
    return path


def at_once(path: Path) -> int:
    with path.open("rb") as stream:
        return rows_at_once(stream, pq.read_metadata(path), ["url", "caption"])


@pytest.mark.parametrize("settings", [DICTIONARY, PREFIXES], ids=["dictionary", "prefixes"])
def test_a_text_that_is_stored_once_costs_no_memory_for_each_row(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = write(tmp_path / "t.parquet", ["x" * LONG] * 700, **settings)
    assert path.stat().st_size < 200_000
    done = subprocess.run([sys.executable, "-c", GROWTH, str(path)], capture_output=True, text=True, check=True)
    rows, mebibytes = map(int, done.stdout.split())
    assert rows == 700
    assert mebibytes < 1200  # all rows at once: 2,060


def test_rows_are_the_same_and_batches_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number} " * (1 + number * 7 % 900) for number in range(1000)]
    path = write(tmp_path / "t.parquet", texts, row_group_size=300)
    recipe = Recipe.model_validate({"dataset": "unused", "source": {"path": str(path)}})
    whole = pa.concat_tables(SourceReader(recipe).tables()).to_pylist()
    assert [row["caption"] for row in whole] == texts
    monkeypatch.setattr(tables, "BATCH_BYTES", 50_000)
    parts = list(SourceReader(recipe).tables())
    assert pa.concat_tables(parts).to_pylist() == whole
    assert len(parts) > 20
    assert max(len("".join(part["caption"].to_pylist())) for part in parts) < 2 * 50_000  # cut by mean size


def test_few_rows_are_read_at_once_where_a_value_may_be_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = [f"a photo of {number * 7919 % 1009} things" for number in range(5000)]
    assert at_once(write(tmp_path / "usual.parquet", usual)) == 256
    monkeypatch.setattr(table_checks, "_BYTES_AT_ONCE", 256 * 1000)
    text = ["y" * 100_000] * 50
    for settings, most in ((DICTIONARY, 2), (PREFIXES, 2), (PLAIN, 256)):  # plain text is stored for each row
        assert at_once(write(tmp_path / "t.parquet", text, **settings)) <= most
    assert at_once(write(tmp_path / "t.parquet", text, **PLAIN)) == 256
