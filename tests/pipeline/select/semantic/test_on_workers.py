"""Embeddings on workers: the outcome is that of one process, and nothing is left of the steps between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from in_process import run_all_here
from staged_rows import outcomes, recipe, stage

from capstan.pipeline import units as unit_map
from capstan.pipeline.config import Resources
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.score.store import embeddings
from capstan.pipeline.select.arrays.apart import NOTHING, Apart
from capstan.pipeline.select.decide import decide
from capstan.pipeline.select.semantic import clusters, on_workers
from capstan.pipeline.select.semantic.clusters import find_semantic
from capstan.pipeline.select.semantic.on_workers import VectorFiles
from capstan.pipeline.storage import Storage

DIM = 16


def kept(storage: Storage, unit: Staged, rows: np.ndarray) -> Staged:
    """Return the unit with embeddings; a row of zeros has none."""
    name = f"scores/e/{unit.unit}.parquet"
    column = pa.array([row if row.any() else None for row in rows], pa.list_(pa.float16(), rows.shape[1]))
    storage.write_table(name, pa.table({"embedding": column, "error": [""] * len(rows)}))
    return replace(unit, scores=(("embeddings", name),))


@pytest.fixture
def units(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> list[Staged]:
    """Two batches; every third row is an earlier one with a little noise. The last unit was not scored."""
    monkeypatch.setattr(unit_map, "run", run_all_here)
    for name, value in {"GROUP_ROWS": 90, "_BUCKET_ROWS": 100, "MOST_HERE": 2}.items():
        monkeypatch.setattr(on_workers, name, value)
    monkeypatch.setattr(clusters, "CLUSTER_ROWS", 25)
    random = np.random.default_rng(0)
    rows = random.standard_normal((600, DIM)).astype(np.float16)
    for row in range(2, 600, 3):
        rows[row] = rows[random.integers(0, row)] + random.standard_normal(DIM) * 0.03
    rows[::50] = 0
    made = []
    for number in range(12):
        unit = stage(storage, f"{number // 9:04d}-{number % 9:06d}", [{"phash": 0}] * 50)
        made.append(kept(storage, unit, rows[50 * number : 50 * number + 50]) if number < 11 else unit)
    return made


def found(storage: Storage, units: list[Staged], order: np.ndarray, first: int, apart: Apart) -> list[list[int]]:
    """Return what one process finds, and what workers do."""
    files = VectorFiles(storage, units, "embeddings", Resources(), progress=False)
    here = find_semantic(embeddings(storage, units), order, 0.95, first=first, apart=apart)
    return [here.tolist(), files.find(order, 0.95, first=first, apart=apart).tolist()]


@pytest.mark.parametrize("most", [4096, 4])
@pytest.mark.parametrize("first", [300, 0, 20])
def test_workers_find_what_one_process_finds(
    most: int, first: int, storage: Storage, units: list[Staged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "MOST_CLUSTERS", most)
    order = np.random.default_rng(1).permutation(600)[:500]
    for apart in (NOTHING, Apart.of(500, np.random.default_rng(2).permutation(500).reshape(-1, 2))):
        here, on_them = found(storage, units, order, first, apart)
        assert on_them == here
        assert max(here) > 0
    assert not storage.names("state")


@pytest.mark.parametrize("rows", [50, 1000])
def test_the_size_of_groups_and_buckets_changes_nothing(
    rows: int, storage: Storage, units: list[Staged], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GROUP_ROWS", "_BUCKET_ROWS"):
        monkeypatch.setattr(on_workers, name, rows)
    here, on_them = found(storage, units, np.arange(600), 450, NOTHING)
    assert on_them == here


def test_equal_embeddings_of_more_clusters_than_are_made_at_once(
    storage: Storage, units: list[Staged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "MOST_CLUSTERS", 4)
    same = [kept(storage, unit, np.ones((50, DIM), np.float16)) for unit in units]
    assert found(storage, same, np.arange(600), 600, NOTHING)[1] == [-1] + [0] * 599


def test_a_selection_of_many_embeddings_is_on_workers(
    storage: Storage, units: list[Staged], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(score={"clip": {"embeddings": True}}, dedup={"perceptual": None, "semantic": 0.95})
    here = outcomes(decide(asked, storage, units))
    ran: list[int] = []
    find = VectorFiles.find

    def counted(files: VectorFiles, order: np.ndarray, *rest: Any, **more: Any) -> np.ndarray:
        ran.append(len(order))
        return find(files, order, *rest, **more)

    monkeypatch.setattr(VectorFiles, "find", counted)
    assert outcomes(decide(asked, storage, units, may_write=True, progress=False)) == here
    assert "semantic" in {row[1] for row in here}
    assert ran == [600]
    bare = [replace(unit, scores=()) for unit in units]
    with pytest.raises(RecipeError, match="no embeddings are kept"):
        decide(asked, storage, bare, may_write=True, progress=False)


def test_a_file_that_changed_on_the_way_is_refused(
    storage: Storage, units: list[Staged], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(job: unit_map.Job, work: list[unit_map.Unit], *_: Any, **__: Any) -> unit_map.Summary:
        summary = run_all_here(job, work)
        if job.name == "semantic-assign":
            name = next(name for name in storage.names("state/columns/values") if "assigned" in name)
            storage.write(name, storage.read(name).replace(b"\1", b"\2"))
        return summary

    monkeypatch.setattr(unit_map, "run", run)
    with pytest.raises(DamagedFile, match="CRC-32"):
        VectorFiles(storage, units, "embeddings", Resources(), progress=False).find(np.arange(600), 0.9, first=600)
    assert not storage.names("state/columns")


def test_a_damaged_file_of_scores_is_named(storage: Storage, units: list[Staged]) -> None:
    name = dict(units[7].scores)["embeddings"]
    storage.write(name, storage.read(name)[:-9] + b"no footer")
    with pytest.raises(DamagedFile) as raised:
        VectorFiles(storage, units, "embeddings", Resources(), progress=False).find(np.arange(600), 0.9, first=600)
    assert raised.value.file == storage.path(name)
    assert not storage.names("state/columns")


def test_what_workers_are_handed_does_not_grow_with_the_groups(
    storage: Storage, units: list[Staged], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the rows of a bucket are in each group is in files, not in lists of the process that decides."""
    sizes: dict[int, list[int]] = {}

    def run(job: unit_map.Job, work: list[unit_map.Unit], *_: Any, **__: Any) -> unit_map.Summary:
        if job.name == "semantic-compare":
            sizes.setdefault(rows, []).extend(len(str(unit.spec)) for unit in work)
        return run_all_here(job, work)

    monkeypatch.setattr(unit_map, "run", run)
    for rows in (50, 300):
        monkeypatch.setattr(on_workers, "GROUP_ROWS", rows)
        VectorFiles(storage, units, "embeddings", Resources(), progress=False).find(np.arange(600), 0.9, first=600)
    assert sizes[50] == sizes[300]
