"""The conditions on all rows of many units → arrays of a value per row, read on workers if the rows are many

    state/columns/values/<number>      values of half a million rows, from a worker, until the selection has them

This process reads a million rows in a second or two, so workers pay for tens of millions: with tables of 10,000 rows in
a bucket, waiting for thousands of files takes longer than reading them. What is read, and its order, is the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.errors import Quarantined
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.score import registry
from capstan.pipeline.select.arrays.large_arrays import LargeArrays
from capstan.pipeline.select.arrays.saved import SCRATCH, Arrays, load, save
from capstan.pipeline.select.column_blocks import ColumnBlocks, Part
from capstan.pipeline.select.conditions import Query, QueryResult
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import SMALL_RUN, Job, Piece, Unit, run_once

_BLOCK_ROWS: Final = 100_000  # evaluated together: a query costs milliseconds even for few rows
_UNIT_ROWS: Final = 500_000  # that a worker reads at a time: half a second of work
_ON_CLUSTER: Final = 16  # units that are worth the workers of a cluster
_ARRAYS: Final = ("step", "key", "sha256", "area", "phash")


def evaluate_conditions(
    recipe: Recipe, storage: Storage, units: Sequence[Staged], *, may_write: bool = False, progress: bool = True
) -> QueryResult:
    """Evaluate the recipe's conditions on all rows of the units. Raises RecipeError for a condition that fails.

    Many rows are read on workers if the dataset's folder may be written to: that is how their values arrive.
    """
    whole, start = LargeArrays(sum(unit.rows for unit in units)), 0
    query = Query(recipe, storage)
    try:
        parts = list(ColumnBlocks(storage, registry.columns(recipe)).parts(units, _BLOCK_ROWS))
        work = _units(parts) if may_write else []
        found = _read_on_workers(recipe, query, storage, work, progress) if _pays(work) else _read(query, parts)
        for values in found:
            for name, own in values.items():
                whole.put(name, start, own)
            start += len(values["step"])
        empty = query.empty()
    finally:
        query.close()
    arrays = {name: whole.array(name, own) for name, own in flat(empty).items()}
    return QueryResult(
        **{name: arrays[name] for name in _ARRAYS},
        colours=arrays.get("colours"),
        groups={number: arrays[f"group {number}"] for number in empty.groups},
        ranks={number: arrays[f"rank {number}"] for number in empty.ranks},
    )


def flat(found: QueryResult) -> Arrays:
    """Return all arrays of a result by name."""
    arrays = {name: getattr(found, name) for name in _ARRAYS}
    arrays |= {} if found.colours is None else {"colours": found.colours}
    arrays |= {f"group {number}": values for number, values in found.groups.items()}
    return arrays | {f"rank {number}": values for number, values in found.ranks.items()}


def _read(query: Query, parts: Iterable[Part]) -> Iterator[Arrays]:
    """Yield the values of the parts' rows in order."""
    yield from map(flat, ahead(query.run, parts))


# On workers --------------------------------------------------------------------------------------------------------


class _Evaluate(Job):
    """The job that evaluates conditions. A unit of it has the rows of some parts."""

    name, title = "select-read", "select: read"

    def __init__(self, recipe: Recipe, storage: Storage) -> None:
        self.storage, self._recipe = storage, recipe
        self._query: Query | None = None  # made once on each worker

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_query": None}

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Publish the values; yield one piece: where they are."""
        self._query = self._query or Query(self._recipe, self.storage)
        blocks = list(_read(self._query, map(_part_of, unit.spec["parts"])))
        values = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        yield save(self.storage, unit.spec["file"], values)

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts


def _units(parts: Sequence[Part]) -> list[Unit]:
    """Return the parts, in order, as units of half a million rows."""
    groups, rows = list[list[Part]](), _UNIT_ROWS
    for part in parts:
        if rows >= _UNIT_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(part)
        rows += sum(unit.rows for unit in part.units)
    made = []
    for number, group in enumerate(groups):
        listed = [[[_plain(unit) for unit in part.units], part.block, list(part.ranges)] for part in group]
        spec = {"parts": listed, "file": f"{SCRATCH}/{number:09d}"}
        made.append(Unit(f"{number:09d}", spec | {"rows": sum(unit.rows for part in group for unit in part.units)}))
    return made


def _plain(unit: Staged) -> list[Any]:
    return [unit.unit, unit.table, unit.rows, dict(unit.scores)]


def _part_of(listed: Sequence[Any]) -> Part:
    units, block, ranges = listed
    staged = [Staged(unit, table, "", rows, tuple(scores.items())) for unit, table, rows, scores in units]
    return Part(staged, block, [(start, stop) for start, stop in ranges])


def _pays(work: Sequence[Unit]) -> bool:
    """Return whether so many rows are worth starting workers, or using those of a cluster."""
    return len(work) > (_ON_CLUSTER if os.environ.get("RAY_ADDRESS") else SMALL_RUN)


def _read_on_workers(
    recipe: Recipe, query: Query, storage: Storage, work: Sequence[Unit], progress: bool
) -> Iterator[Arrays]:
    """Yield the values of all units in order, read on workers."""
    storage.delete(*storage.names(SCRATCH))  # of a selection that was killed
    try:
        done = _run(_Evaluate(recipe, storage), work, recipe.resources, progress)
        if done is None:
            yield from _read(query, (_part_of(one) for unit in work for one in unit.spec["parts"]))
        else:
            yield from ahead(lambda facts: load(storage, **facts), done)
    finally:
        storage.delete(*(unit.spec["file"] for unit in work))


def _run(job: Job, work: Sequence[Unit], resources: Resources, progress: bool) -> list[dict[str, Any]] | None:
    """Return the units' facts; None if some cannot be read on workers: whoever reads them here is told why."""
    try:
        return run_once(job, work, resources, progress=progress)
    except Quarantined:
        return None
