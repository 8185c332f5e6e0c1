"""The index of a large dataset: the same answers as the ledger's, from a sample until it is there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from capstan.pipeline.dataset.shards import LedgerEntry, Manifest, sha256_of, write_manifest
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.records import LEDGER_SCHEMA
from capstan.pipeline.report import query, row_index
from capstan.pipeline.report.explore import Explorer, Judged
from capstan.pipeline.report.query import Rows
from capstan.pipeline.report.row_index import RowIndex
from capstan.pipeline.select.review import SCHEMA
from capstan.pipeline.storage import Storage, parquet_bytes

UNITS, ROWS, SAMPLE = 20, 50, 200
SCORED = LEDGER_SCHEMA.append(pa.field("clip_score", pa.float32()))


def write(storage: Storage) -> None:
    """A ledger of UNITS × ROWS rows whose keys rise from unit to unit; only later units have a score."""
    random, entries = np.random.default_rng(0), []
    for number in range(UNITS):
        schema = SCORED if number > 5 else LEDGER_SCHEMA
        rows = [row(number, index, random) for index in range(ROWS)]
        data = parquet_bytes(pa.Table.from_pylist(rows, schema))
        storage.write(f"ledger/unit-0000-{number:06d}.parquet", data)
        entries.append(LedgerEntry(name=f"unit-0000-{number:06d}", rows=ROWS, sha256=sha256_of(data)))
    write_manifest(storage, Manifest(ledger=entries))


def row(unit: int, index: int, random: np.random.Generator) -> dict[str, Any]:
    plain = {name: "" if kind == pa.string() else 0 for name, kind in zip(SCORED.names, SCORED.types, strict=True)}
    own = {"key": f"{unit:016x}{index:016x}", "unit": f"0000-{unit:06d}", "width": int(random.integers(1, 1000))}
    own |= {"outcome": ["kept", "rejected"][index % 3 == 0], "caption": f"a {['cat', 'dog'][index % 2]} {index}"}
    own |= {"url": "https://images.example"}
    return plain | own | {"clip_score": float(random.random())}


@pytest.fixture
def explorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Explorer]:
    storage = Storage(str(tmp_path / "ds"))
    write(storage)
    for module in (query, row_index):
        monkeypatch.setattr(module, "SAMPLE", SAMPLE)
    with Rows(storage) as rows:
        explorer = Explorer(rows, cache=tmp_path / "cache")
        yield explorer
        explorer.close()


QUESTIONS: list[dict[str, Any]] = [
    {},
    {"order": "clip_score", "descending": True},
    {"order": "clip_score"},
    {"order": "outcome", "descending": True},  # hundreds of equal values
    {"order": "caption"},
    {"where": "width > 500"},
    {"where": "caption LIKE '%cat%'"},  # a text that the index lacks
    {"outcome": "rejected", "order": "width"},
    {"where": "clip_score IS NULL"},
]


@pytest.mark.parametrize("asked", QUESTIONS)
def test_pages_are_those_of_the_ledger(explorer: Explorer, asked: dict[str, Any]) -> None:
    with Rows(explorer.rows.storage) as rows:
        terms = [asked.get("where", "true"), f"outcome = '{asked['outcome']}'" if "outcome" in asked else "true"]
        order = f"{asked.get('order', 'key')} {'DESC' if 'descending' in asked else 'ASC'} NULLS LAST, key"
        sql = f"SELECT key FROM rows WHERE ({') AND ('.join(terms)}) ORDER BY {order}"
        expected = [key for (key,) in rows.query(sql)]
    explorer.prepare()
    keys, after = [], None
    while True:
        page = explorer.page(limit=70, after=after, **asked)
        assert page.low is None
        keys += [found.key for found in page.rows]
        after = page.next
        if after is None:
            break
    assert keys == expected


def test_a_grid_reads_captions_only(explorer: Explorer) -> None:
    explorer.prepare()
    whole = explorer.page(order="width", limit=30).rows
    assert {found.url for found in whole} == {"https://images.example"}
    grid = explorer.page(order="width", limit=30, texts=["caption"]).rows
    assert grid == [dataclasses.replace(found, url="") for found in whole]
    assert all(explorer.rows.rows([found.key])[found.key] == found for found in whole)


def test_before_the_index_answers_are_a_sample_with_bounds(explorer: Explorer) -> None:
    assert explorer.preparing
    page = explorer.page(where="width > 500")
    assert page.low is not None
    assert page.high is not None
    assert page.low <= 500 <= page.high
    assert sum(explorer.outcomes.values()) == UNITS * ROWS
    steps = explorer.funnel([("wide", "width > 500")])
    assert steps[1]["sample"] > 0
    assert steps[1]["low"] <= 500 <= steps[1]["high"]
    explorer.prepare()
    assert not explorer.preparing
    (exact,) = explorer.rows.query("SELECT count(*) FROM rows WHERE width > 500")[0]
    assert explorer.funnel([("wide", "width > 500")])[1] == {"step": "wide", "left": exact, "lost": 1000 - exact}
    assert explorer.page(where="width > 500").total == exact
    cats = explorer.funnel([("cats", "caption LIKE '%cat%'")])[1]
    assert cats["sample"] == SAMPLE  # the index lacks captions


def test_a_row_and_its_neighbours_are_found_by_the_index(explorer: Explorer) -> None:
    explorer.prepare()
    detail = explorer.detail(f"{3:016x}{0:016x}")
    assert detail is not None
    assert (detail["row"]["caption"], detail["scores"]) == ("a cat 0", {"clip_score": None})
    assert (detail["before"], detail["after"]) == (f"{2:016x}{49:016x}", f"{3:016x}{1:016x}")
    assert explorer.detail("f" * 32) is None
    near = explorer.nearest("clip_score", 0.5)
    assert len(near["below"]) == len(near["above"]) == 6
    assert explorer.histogram("clip_score") is not None


def test_a_review_narrows_the_index_too(explorer: Explorer) -> None:
    explorer.prepare()
    review = pa.table({"key": [f"{4:016x}{7:016x}"], "verdict": ["reject"]})
    assert [found.key for found in explorer.page(judged=Judged(review, "reject")).rows] == review["key"].to_pylist()
    assert explorer.page(judged=Judged(review, "")).total == 999
    assert explorer.page(judged=Judged(SCHEMA.empty_table(), "keep")).total == 0


def test_the_index_is_found_again_and_belongs_to_one_state(explorer: Explorer, tmp_path: Path) -> None:
    explorer.prepare()
    (file,) = (tmp_path / "cache").iterdir()
    with Rows(explorer.rows.storage) as rows:
        again = Explorer(rows, cache=tmp_path / "cache")
        assert not again.preparing
        again.close()
    manifest = explorer.rows.manifest
    assert manifest is not None
    write_manifest(explorer.rows.storage, manifest.model_copy(update={"ledger": manifest.ledger[:-1]}))
    assert RowIndex(explorer.rows.storage, tmp_path / "cache").file != file


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00" * 100_000])
def test_an_index_that_cannot_be_read_is_built_again(explorer: Explorer, tmp_path: Path, content: bytes) -> None:
    file = RowIndex(explorer.rows.storage, tmp_path / "cache").file
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    with Rows(explorer.rows.storage) as rows:
        again = Explorer(rows, cache=tmp_path / "cache")
        assert again.preparing
        again.prepare()
        assert again.page(where="width > 500").low is None
        again.close()


def test_a_build_that_is_interrupted_or_fails_leaves_nothing(explorer: Explorer, tmp_path: Path) -> None:
    index = RowIndex(explorer.rows.storage, tmp_path / "cache")
    index.close()
    with pytest.raises(InterruptedError):
        index.build()
    assert list((tmp_path / "cache").iterdir()) == []
    explorer.rows.storage.delete("ledger/unit-0000-000003.parquet")
    explorer.prepare()
    assert not explorer.preparing
    assert list((tmp_path / "cache").iterdir()) == []


def test_few_indexes_are_kept(explorer: Explorer, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number:032x}-1.duckdb").write_bytes(b"")
        os.utime(folder / f"{number:032x}-1.duckdb", (number, number))
    (folder / ".partial-999999999-x").write_bytes(b"")
    explorer.prepare()
    kept = sorted(file.name for file in folder.iterdir())
    assert len(kept) == row_index.KEPT
    assert f"{7:032x}-1.duckdb" in kept


def test_sql_reaches_neither_files_nor_tables_by_the_index(explorer: Explorer) -> None:
    explorer.prepare()
    for text in (
        "width > (SELECT count(*) FROM kept.indexed)",
        "true; DROP VIEW rows",
        "read_text('/etc/passwd') = ''",
    ):
        with pytest.raises(RecipeError):
            explorer.page(where=text)
