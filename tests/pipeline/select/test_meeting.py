"""Rows of new batches meet kept rows: decisions are those of a selection of all rows, whatever happened to the runs."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from in_process import run_all_here
from staged_rows import recipe, stage

from capstan.pipeline import units as unit_map
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import LedgerEntry, Manifest, ShardEntry
from capstan.pipeline.image.phash import COLOUR_BYTES
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.pack.ledger import WriteLedger
from capstan.pipeline.records import KEPT, REMOVED
from capstan.pipeline.select import hash_pairs, kept_runs, meeting
from capstan.pipeline.select.conditions import HELD_PLACE
from capstan.pipeline.select.decide import Decisions, decide, funnel_with, shard_name
from capstan.pipeline.select.hash_pairs import Few, Prints, rows_of_few
from capstan.pipeline.select.meeting import KeptRows
from capstan.pipeline.storage import Storage


def asked(**dedup: Any) -> Recipe:
    steps = [{"name": "wide", "where": "width > 0"}]
    return recipe(select=steps, dedup={"perceptual": 3, "colours": 8, **dedup}, shards={"samples": 20})


@pytest.fixture
def staged(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> list[Staged]:
    """Units of three batches, which repeat each other by file, by hash, and by hash but not in colours."""
    monkeypatch.setattr(unit_map, "run", run_all_here)
    for name, value in {"LEAST": 1, "_TABLES": 2}.items():
        monkeypatch.setattr(kept_runs, name, value)
    monkeypatch.setattr(meeting, "_UNIT_ROWS", 50)
    random, made = np.random.default_rng(0), []
    for number in range(9):
        rows = []
        for _ in range(40):
            file = int(random.integers(250))
            image = np.random.default_rng(file)  # equal files are equal images
            phash = int(image.integers(12)) << 50 | int(image.integers(16)) << int(image.integers(8))
            look = bytes(image.integers(0, 3, COLOUR_BYTES, np.uint8) + 90 * image.integers(2, dtype=np.uint8))
            row = {"sha256": f"{file:064x}" if file % 3 else f"{file << 200:064x}", "phash": phash}
            row |= {"colours": base64.b64encode(look).decode(), "width": int(random.integers(9))}
            row |= {"original_width": int(image.integers(300, 304))}
            kind = random.random()
            row |= {"reason": "timeout", "sha256": "", "phash": 0, "colours": ""} if kind < 0.05 else {}
            row |= {"reason": REMOVED} if 0.05 <= kind < 0.08 else {}
            rows.append(row)
        made.append(stage(storage, f"{number // 3:04d}-{number % 3:06d}", rows))
    return made


def published(storage: Storage, of: Recipe, decisions: Decisions, before: Manifest) -> Manifest:
    """Write the ledger tables of decisions; return the manifest with them, and with shards that are nowhere."""
    job = WriteLedger(of, storage, [])
    ledger = list(before.ledger)
    for unit in job.handed_over(job.units(decisions), decisions):
        ((facts),) = job.prepare(unit)
        ledger.append(LedgerEntry(**{name: facts[name] for name in ("name", "rows", "sha256")}))
    shards = [
        ShardEntry(name=shard_name(number), samples=1, bytes=1, sha256="0" * 64, table_sha256="0" * 64)
        for number in range(len(before.shards) + decisions.counts["shards"])
    ]
    counts = {name: before.counts.get(name, 0) + count for name, count in decisions.counts.items()}
    funnel = funnel_with(of, before.funnel, decisions.funnel) if before.funnel else decisions.funnel
    return Manifest(counts=counts, funnel=funnel, shards=shards, ledger=ledger)


def take_down(storage: Storage, of: Recipe, staged: list[Staged], outcome: str, every: int) -> None:
    """Let some rows with an outcome be removed, and hold their place."""
    decisions = decide(of, storage, staged)
    found = np.array(listed(decisions)[0]) == outcome
    for unit, start in zip(staged, decisions.starts, strict=False):
        table = storage.read_table(unit.table)
        rows = table.to_pylist()
        for place in np.flatnonzero(found[start : start + unit.rows])[::every].tolist():
            rows[place] |= {"reason": REMOVED, "detail": HELD_PLACE}
        storage.write_table(unit.table, pa.Table.from_pylist(rows, table.schema))


def listed(decisions: Decisions, start: int = 0) -> list[list[Any]]:
    columns = decisions.columns(start, len(decisions.step))
    return [column.to_pylist() for column in columns.values()]


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize(
    "dedup", [{}, {"exact": False}, {"perceptual": None}, {"colours": None}, {"exact": False, "perceptual": None}]
)
def test_new_batches_are_decided_as_in_a_selection_of_all(
    dedup: dict[str, Any], runs: bool, storage: Storage, staged: list[Staged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_NEW_ROWS", 64)
    of, manifest = asked(**dedup), Manifest()
    take_down(storage, of, staged, KEPT, 3)
    for batch in range(3):
        units = staged[: 3 * batch + 3]
        kept = KeptRows(of, storage, manifest, units, progress=False) if batch else None
        decisions = decide(of, storage, units[3 * batch :], earlier=kept)
        whole = decide(of, storage, units)
        assert listed(decisions) == listed(whole, 120 * batch)
        assert decisions.settled
        manifest = published(storage, of, decisions, manifest)
        assert manifest.counts == whole.counts
        assert manifest.funnel == whole.funnel
        if runs:
            kept_runs.cover(of, storage, manifest, units, progress=False)
            assert len([name for name in storage.names(kept_runs.FOLDER) if "parquet" in name]) == 2 * (batch + 1)
        assert not [name for name in storage.names(kept_runs.FOLDER) if "meet" in name]
    reasons = set(listed(whole)[1])
    assert {"exact", "perceptual"} - set(reasons) == {
        name for name in ("exact", "perceptual") if dedup.get(name, True) in (False, None)
    }


def test_whether_removed_rows_are_settled_is_noted(storage: Storage, staged: list[Staged]) -> None:
    take_down(storage, asked(), staged, "duplicate", 9)
    decisions = decide(asked(), storage, staged)
    manifest = published(storage, asked(), decisions, Manifest()).model_copy(update={"selection": "one"})
    for settled in (decisions.settled, True):
        kept_runs.cover(asked(), storage, manifest, staged, settled=settled, progress=False)
        assert kept_runs.is_settled(storage, manifest) == settled
        assert not kept_runs.is_settled(storage, manifest.model_copy(update={"selection": "another"}))
    assert not decisions.settled


def test_a_row_follows_one_that_repeats_an_earlier_row(storage: Storage, staged: list[Staged]) -> None:
    """Of two equal new files the first is near a kept row: both repeat that row."""
    of = asked(colours=None)
    old = stage(storage, "0000-000000", [{"phash": 0}])
    new = stage(storage, "0001-000000", [{"phash": 1, "sha256": "a" * 64}, {"phash": 1, "sha256": "a" * 64}])
    manifest = published(storage, of, decide(of, storage, [old]), Manifest())
    decisions = decide(of, storage, [new], earlier=KeptRows(of, storage, manifest, [old, new], progress=False))
    assert listed(decisions) == listed(decide(of, storage, [old, new]), 1)
    assert listed(decisions)[1] == ["perceptual", "exact"]


def test_new_rows_meet_in_parts_that_fit_in_memory(
    storage: Storage, staged: list[Staged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_pairs, "_FEW", 4)
    monkeypatch.setattr(hash_pairs, "_FEW_BYTES", 1000)
    seen: list[int] = []
    made = Few.__init__

    def noted(few: Few, prints: Prints) -> None:
        made(few, prints)
        seen.append(sum(part.nbytes for _, keys, by, _, there in few._sorted for part in (keys, by, there)))

    monkeypatch.setattr(Few, "__init__", noted)
    manifest = published(storage, asked(), decide(asked(), storage, staged[:6]), Manifest())
    kept = KeptRows(asked(), storage, manifest, staged, progress=False)
    decisions = decide(asked(), storage, staged[6:], earlier=kept)
    assert listed(decisions) == listed(decide(asked(), storage, staged), 240)
    assert len(seen) > 1
    assert max(seen) <= 1000


@pytest.mark.parametrize("distance", range(17))
def test_memory_of_new_rows_is_bounded_at_every_distance(distance: int) -> None:
    for rows in (20_000, 1_000_000):
        few = rows_of_few(rows, distance)
        masks = len(hash_pairs._masks(few, distance, hash_pairs._MANY))
        assert masks * (12 * few + (4 << few.bit_length())) <= 512 << 20
        assert few >= min(rows, 10_000)


@pytest.mark.parametrize("few", [True, False])
def test_new_rows_are_sorted_where_they_are_met(
    few: bool, storage: Storage, staged: list[Staged], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that decides sorts none if workers do it."""
    opened: list[bool] = []
    once = meeting._Meet.open

    def noted(job: meeting._Meet) -> Any:
        opened.append(on_workers)
        return once(job)

    def run(*arguments: Any, **more: Any) -> unit_map.Summary:
        nonlocal on_workers
        on_workers = True
        summary = run_all_here(*arguments, **more)
        on_workers = False
        return summary

    manifest, on_workers = published(storage, asked(), decide(asked(), storage, staged[:6]), Manifest()), False
    monkeypatch.setattr(unit_map, "run", run)
    monkeypatch.setattr(unit_map, "SMALL_RUN", 64 if few else 0)
    monkeypatch.setattr(meeting._Meet, "open", noted)
    kept = KeptRows(asked(), storage, manifest, staged, progress=False)
    decide(asked(), storage, staged[6:], earlier=kept)
    assert set(opened) == {not few}


@pytest.mark.parametrize("what", ["damaged", "lost", "another", "index"])
@pytest.mark.parametrize("perceptual", [3, None])
def test_a_broken_run_costs_reads_and_nothing_else(
    what: str, perceptual: int | None, storage: Storage, staged: list[Staged], caplog: pytest.LogCaptureFixture
) -> None:
    of = asked(perceptual=perceptual)
    manifest = published(storage, of, decide(of, storage, staged[:6]), Manifest())
    kept_runs.cover(of, storage, manifest, staged[:6], progress=False)
    first, second, *_ = (name for name in storage.names(kept_runs.FOLDER) if name.endswith(".parquet"))
    if what == "damaged":
        storage.write(first, storage.read(first)[:-9] + b"no footer")
    elif what == "lost":
        storage.delete(first)
    elif what == "another":
        storage.write(first, storage.read(second))
    else:
        storage.write(f"{kept_runs.FOLDER}/index.json", b"{]")
    kept = KeptRows(of, storage, manifest, staged, progress=False)
    decisions = decide(of, storage, staged[6:], earlier=kept)
    assert "tables are read" in caplog.text
    assert listed(decisions) == listed(decide(of, storage, staged), 240)


def test_runs_of_changed_tables_are_not_used_and_replaced(storage: Storage, staged: list[Staged]) -> None:
    manifest = published(storage, asked(), decide(asked(), storage, staged[:6]), Manifest())
    kept_runs.cover(asked(), storage, manifest, staged[:6], progress=False)
    before = set(storage.names(kept_runs.FOLDER))
    other = asked().model_copy(update={"select": recipe(select=[{"name": "wide", "where": "width > 4"}]).select})
    manifest = published(storage, other, decide(other, storage, staged[:6]), Manifest())
    kept = KeptRows(other, storage, manifest, staged, progress=False)
    assert not any(part["run"] for unit in kept._work for part in unit.spec["parts"])
    decisions = decide(other, storage, staged[6:], earlier=kept)
    assert listed(decisions) == listed(decide(other, storage, staged), 240)
    kept_runs.cover(other, storage, manifest, staged[:6], progress=False)
    assert before & set(storage.names(kept_runs.FOLDER)) == {f"{kept_runs.FOLDER}/index.json"}


def test_runs_with_rows_of_taken_down_units_are_removed(storage: Storage, staged: list[Staged]) -> None:
    manifest = published(storage, asked(), decide(asked(), storage, staged), Manifest())
    kept_runs.cover(asked(), storage, manifest, staged, progress=False)
    before = storage.names(kept_runs.FOLDER)
    storage.write(f"{kept_runs.FOLDER}/meet-new", b"of a selection that was killed")
    kept_runs.forget(storage, {"0001-000001"})
    assert len(storage.names(kept_runs.FOLDER)) == len(before) - 1
    kept_runs.cover(asked(), storage, manifest, staged, progress=False)
    assert storage.names(kept_runs.FOLDER) == before
    kept_runs.forget(storage, None)
    assert storage.names(kept_runs.FOLDER) == [f"{kept_runs.FOLDER}/index.json"]
