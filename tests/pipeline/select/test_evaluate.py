"""Conditions on many rows: workers find the same values as this process, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from in_process import run_all_here
from staged_rows import outcomes, recipe, scored, stage

from capstan.pipeline import units
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.select import column_blocks, evaluate
from capstan.pipeline.select.arrays.saved import SCRATCH
from capstan.pipeline.select.decide import decide
from capstan.pipeline.storage import Storage

STEPS = [
    {"name": "wide", "where": "width >= 105 AND coalesce(clip_score, 1) > 0.1"},
    {"name": "named", "where": "caption <> 'c3'"},
    {"name": "domains", "at_most": 9, "per": "domain", "by": "clip_score"},
]
ASKED = recipe(select=STEPS, score={"clip": {}}, dedup={"perceptual": 2})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many units each run on workers had; units are of seven rows, and more than two are worth workers."""
    seen: list[int] = []

    def run(job: units.Job, work: Sequence[units.Unit], *rest: Any, **more: Any) -> units.Summary:
        seen.append(len(work))
        return run_all_here(job, work, *rest, **more)

    monkeypatch.setattr(units, "run", run)
    for name, value in {"SMALL_RUN": 2, "_ON_CLUSTER": 1, "_BLOCK_ROWS": 4, "_UNIT_ROWS": 7}.items():
        monkeypatch.setattr(evaluate, name, value)
    return seen


def staged_units(storage: Storage, count: int) -> list[Staged]:
    made = []
    for number in range(count):
        rows = [{"width": 100 + number, "url": "http://a/"}, {"caption": f"c{number}"}, {"reason": "timeout"}]
        made.append(scored(storage, stage(storage, f"0000-{number:06}", rows), [number / 10, None, 0.5]))
    return made


@pytest.mark.parametrize("blocks", [False, True])
def test_workers_find_what_this_process_finds(
    blocks: bool, storage: Storage, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = staged_units(storage, 20)
    if blocks:
        for name, value in {"LEAST": 2, "_UNITS": 5}.items():
            monkeypatch.setattr(column_blocks, name, value)
        column_blocks.cover(ASKED, storage, made, progress=False)
        runs.clear()
    files = storage.names("")
    here, on_workers = decide(ASKED, storage, made), decide(ASKED, storage, made, may_write=True, progress=False)
    assert runs == [4 if blocks else 5]
    assert outcomes(on_workers) == outcomes(here)
    for name in ("key", "sha256"):
        assert np.array_equal(getattr(on_workers, name), getattr(here, name))
    assert storage.names("") == files


def test_few_rows_are_read_here(storage: Storage, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made = staged_units(storage, 6)
    decide(ASKED, storage, made, may_write=True, progress=False)
    assert not runs
    monkeypatch.setenv("RAY_ADDRESS", "a cluster that is there in any case")
    decide(ASKED, storage, made, may_write=True, progress=False)
    assert runs == [2]


def test_a_condition_that_fails_is_named(storage: Storage, runs: list[int]) -> None:
    failing = recipe(select=[{"name": "number", "where": "caption::INT > 3"}], score={"clip": {}})
    with pytest.raises(RecipeError, match=r"select\.number\.where"):
        decide(failing, storage, staged_units(storage, 20), may_write=True, progress=False)
    assert runs


def test_a_table_that_cannot_be_read_is_named(storage: Storage, runs: list[int]) -> None:
    made = staged_units(storage, 20)
    storage.write(made[9].table, b"no table")
    with pytest.raises(DamagedFile, match=made[9].table):
        decide(ASKED, storage, made, may_write=True, progress=False)
    assert runs
    assert not storage.names(SCRATCH)


def test_values_that_changed_on_the_way_are_refused(
    storage: Storage, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(job: units.Job, work: Sequence[units.Unit], *_: Any, **__: Any) -> units.Summary:
        summary = run_all_here(job, work)
        name = work[1].spec["file"]
        storage.write(name, storage.read(name).replace(b"\1", b"\2"))
        return summary

    monkeypatch.setattr(units, "run", run)
    with pytest.raises(DamagedFile, match="values/000000001"):
        decide(ASKED, storage, staged_units(storage, 20), may_write=True, progress=False)


def test_what_a_killed_selection_left_is_removed(storage: Storage, runs: list[int]) -> None:
    storage.write(f"{SCRATCH}/000000099", b"")
    decide(ASKED, storage, staged_units(storage, 20), may_write=True, progress=False)
    assert runs
    storage.write(f"{SCRATCH}/000000099", b"")
    column_blocks.forget(storage, {"of a takedown"})
    assert not storage.names(SCRATCH)


def test_jobs_travel_without_their_database(storage: Storage) -> None:
    job = evaluate._Evaluate(ASKED, storage)
    (unit,) = evaluate._units([column_blocks.Part([replace(staged_units(storage, 1)[0])])])
    list(job.prepare(unit))
    assert job.__getstate__()["_query"] is None
