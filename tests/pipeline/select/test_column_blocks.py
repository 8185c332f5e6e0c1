"""Blocks of columns: the same outcomes as from the units' own tables, in few reads, whatever is stale or broken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import run_here
from staged_rows import outcomes, recipe, scored, stage

from capstan.pipeline import units
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.select import column_blocks
from capstan.pipeline.select.decide import decide
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import Local

FOLDER = "state/columns"


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage in which few units make blocks, of five at most."""
    monkeypatch.setattr(units, "run", run_here)
    monkeypatch.setattr(column_blocks, "LEAST", 2)
    monkeypatch.setattr(column_blocks, "_UNITS", 5)
    return Storage(str(tmp_path))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Paths of the units' tables and scores and of blocks that are read."""
    seen: list[str] = []
    read = Local.read

    def counted(files: Local, path: str) -> bytes:
        if path.endswith(".parquet") and "/pairs/" not in path:
            seen.append(path)
        return read(files, path)

    monkeypatch.setattr(Local, "read", counted)
    return seen


def staged_units(storage: Storage, numbers: range) -> list[Staged]:
    """Units of three rows: of other sizes in each unit, and one row fails in every fourth."""
    made = []
    for number in numbers:
        failed: dict[str, Any] = {"reason": "timeout", "detail": "late", "sha256": "", "original_width": 0}
        rows = [{"width": 100 + number}, {"width": 200, "caption": f"c{number}"}, failed if number % 4 == 0 else {}]
        unit = stage(storage, f"0000-{number:06}", rows)
        made.append(scored(storage, unit, [number / 10, None, 0.5]))
    return made


def selected(storage: Storage, units_: Sequence[Staged], *conditions: dict[str, str]) -> list[tuple[str, ...]]:
    listed = list(conditions) or [{"name": "wide", "where": "width >= 105 AND coalesce(clip_score, 1) > 0.1"}]
    return outcomes(decide(recipe(select=listed, score={"clip": {}}), storage, list(units_)))


def cover(storage: Storage, units_: Sequence[Staged]) -> None:
    column_blocks.cover(recipe(score={"clip": {}}), storage, units_, progress=False)


def blocks(storage: Storage) -> list[str]:
    return [name for name in storage.names(FOLDER) if name.endswith(".parquet")]


def test_outcomes_are_the_same_and_few_files_are_read(storage: Storage, reads: list[str]) -> None:
    made = staged_units(storage, range(12))
    expected = selected(storage, made)
    assert len(reads) == 2 * 12  # tables and scores
    cover(storage, made)
    assert len(blocks(storage)) == 3
    reads.clear()
    assert selected(storage, made) == expected
    assert len(reads) == 3
    other = {"name": "other", "where": "width < 110 AND url = ''"}
    assert [row[1] for row in selected(storage, made, other)].count("other") == sum(
        not 100 <= 100 + n < 110 for n in range(12)
    ) + 12 + 9  # rows of 200 and of 256 pixels, those that failed not counted


def test_conditions_on_captions_read_the_units(storage: Storage, reads: list[str]) -> None:
    made = staged_units(storage, range(6))
    cover(storage, made)
    reads.clear()
    kept = selected(storage, made, {"name": "captioned", "where": "caption = 'c3'"})
    assert [row[0] for row in kept].count("kept") == 1
    assert len(reads) == 6


def test_new_units_and_those_that_changed_are_read_singly_until_they_are_many(
    storage: Storage, reads: list[str]
) -> None:
    made = staged_units(storage, range(10))
    cover(storage, made)
    again = stage(storage, "0000-000003b", [{"width": 104}, {"width": 300}])
    made[3] = replace(scored(storage, again, [0.3, None]), unit=made[3].unit)
    made += staged_units(storage, range(10, 11))
    reads.clear()
    mixed = selected(storage, made)
    assert len(reads) == 2 + 2 * 2 + 1  # one block is read twice: before and after the changed unit
    for name in blocks(storage):
        storage.delete(name)
    assert selected(storage, made) == mixed
    cover(storage, made)  # blocks that are gone are written again
    reads.clear()
    assert selected(storage, made) == mixed
    assert len(reads) == 3


def test_few_new_units_make_no_block(storage: Storage) -> None:
    made = staged_units(storage, range(6))
    cover(storage, made[:5])
    before = storage.names(FOLDER)
    cover(storage, made)
    assert storage.names(FOLDER) == before


def test_other_columns_of_scores_are_read_from_the_units(storage: Storage, reads: list[str]) -> None:
    made = staged_units(storage, range(5))
    cover(storage, made)
    reads.clear()
    plain = [{"name": "wide", "where": "width >= 105"}]
    decide(recipe(select=plain, score={"clip": {}, "caption": {}}), storage, made)
    assert len(reads) == 5


@pytest.mark.parametrize("what", ["index", "damaged", "lost", "short"])
def test_broken_blocks_cost_reads_only(storage: Storage, what: str, caplog: pytest.LogCaptureFixture) -> None:
    made = staged_units(storage, range(10))
    expected = selected(storage, made)
    cover(storage, made)
    first, second = blocks(storage)
    if what == "index":
        storage.write(f"{FOLDER}/index.json", b'{"a": [1]}')
    elif what == "damaged":
        data = bytearray(storage.read(first))
        data[len(data) // 3] ^= 1
        storage.write(first, bytes(data))
    elif what == "lost":
        storage.delete(first)
    else:
        storage.write_table(first, storage.read_table(second).slice(0, 3))
    assert selected(storage, made) == expected
    assert "own tables are read" in caplog.text
    if what == "index":  # and it is written again
        cover(storage, made)
        assert storage.names(FOLDER) == sorted([first, second, f"{FOLDER}/index.json"])


def test_blocks_of_units_whose_rows_are_taken_down_are_removed(storage: Storage) -> None:
    made = staged_units(storage, range(10))
    cover(storage, made)
    before = blocks(storage)
    storage.write(f"{FOLDER}/left.parquet", b"a block that a killed takedown had not removed yet")
    column_blocks.forget(storage, {"0000-000007"})
    assert len(blocks(storage)) == 1
    column_blocks.forget(storage, {"0000-000007"})
    assert len(blocks(storage)) == 1
    cover(storage, made)
    assert blocks(storage) == before
    column_blocks.forget(storage, None)
    assert storage.names(FOLDER) == [f"{FOLDER}/index.json"]
