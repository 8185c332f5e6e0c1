"""A dataset after a takedown: the shards and ledger tables of the rows' units, and nothing else

A row that was taken down keeps its place, so no other row is decided differently, and only what held the rows is
written again. This needs decisions that do not depend on how many rows there are: with at_most, balance or top, or with
duplicates by embeddings, which are clustered, all rows are selected again (`pipeline.select`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Manifest
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.pack.job import pack_part
from capstan.pipeline.pack.takedown import Takedown
from capstan.pipeline.records import FAILED, REJECTED, REMOVED
from capstan.pipeline.score.scorer import Scorer
from capstan.pipeline.select.conditions import raw_digits
from capstan.pipeline.select.decide import Decided, funnel_without
from capstan.pipeline.source.plan import Plan, units_of_keys
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Summary

_DECIDED = ("outcome", "reason", "detail", "shard")
_READ: Final = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("key", "sha256", *_DECIDED)])


@dataclass(frozen=True)
class _Known(Decided):
    """Decisions that the ledger has, but for the rows that were taken down."""

    table: pa.Table  # _DECIDED

    def columns(self, start: int, stop: int) -> dict[str, pa.Array]:
        rows = self.table.slice(start, stop - start)
        return {name: rows[name].combine_chunks() for name in _DECIDED}


def decides_rows_alone(recipe: Recipe) -> bool:
    """Return whether no row's decision depends on how many other rows there are."""
    vectors = recipe.dedup.semantic is not None or recipe.dedup.copies is not None
    return not vectors and all(one.where is not None or one.review is not None for one in recipe.select)


def pack_without(
    recipe: Recipe,
    storage: Storage,
    plan: Plan,
    staged: Sequence[Staged],
    before: Manifest,
    takedown: Takedown,
    scorers: Sequence[Scorer],
    *,
    progress: bool = True,
) -> tuple[Manifest, Summary]:
    """Publish the dataset without the rows of a takedown, which are scrubbed.

    `before` is its manifest as it was, complete and of this `recipe`; `staged` are all units as they are now.
    """
    tables = {entry.name: entry for entry in before.ledger}

    def ledger(unit: str) -> pa.Table:
        entry = tables[f"unit-{unit}"]
        return storage.read_table(entry.table, _READ.names, sha256=entry.sha256).cast(_READ)

    assert takedown.units is not None
    decided = {unit: ledger(unit) for unit in sorted(takedown.units) if f"unit-{unit}" in tables}
    # All shards of these units: those without any of the rows have tables that name the units' files of scores.
    shards = {shard: unit for unit, table in decided.items() for shard in table["shard"].unique().to_pylist() if shard}
    around = _units_around(storage, plan, before, shards)
    decided |= {unit: ledger(unit) for unit in sorted(around - decided.keys())}
    units = [unit for unit in staged if unit.unit in decided]
    rows = pa.concat_tables([_READ.empty_table(), *(decided[unit.unit] for unit in units)])
    hit = pc.is_in(rows["key"], takedown.keys)
    known = _known(units, rows, hit, shards)
    left = [one for one in before.shards if one.name not in shards]
    counts = Counter(before.counts)
    removed = rows.filter(hit)
    counts.subtract(removed["outcome"].to_pylist())
    counts[REJECTED] += len(removed)
    counts["shards"] = len(left) + len(np.unique(known.shard[known.shard >= 0]))
    result = Manifest(
        counts={name: counts[name] for name in before.counts},
        funnel=funnel_without(recipe, before.funnel, removed),
        shards=left,
        ledger=[entry for entry in before.ledger if entry.name.removeprefix("unit-") not in decided],
    )
    return pack_part(recipe, storage, known, staged, result, scorers, progress=progress)


def _units_around(storage: Storage, plan: Plan, manifest: Manifest, shards: Mapping[str, str]) -> set[str]:
    """Return the units that samples of the shards come from; `shards` maps each to one of its units.

    A shard has samples of one batch, in the order of their keys.
    """
    entries, batches = {entry.name: entry for entry in manifest.shards}, {unit.id: unit.batch for unit in plan.units}
    found = set[str]()
    for shard, one in shards.items():
        entry = entries[shard]
        keys = storage.read_table(entry.table, ["key"], sha256=entry.table_sha256)["key"]
        own = Plan([unit for unit in plan.units if unit.batch == batches[one]], 0, 0)
        (first,), (last,) = (units_of_keys(storage, own, [key.as_py()]) for key in (keys[0], keys[-1]))
        found |= {unit.id for unit in own.units if first.number <= unit.number <= last.number}
    return found


def _known(units: list[Staged], rows: pa.Table, hit: pa.ChunkedArray, shards: Collection[str]) -> _Known:
    """Return the decisions on the rows; those of `hit` are removed. Numbers are of `shards` alone."""
    failed = pc.equal(rows["outcome"], FAILED)
    gone = {"outcome": REJECTED, "reason": REMOVED, "detail": "", "shard": ""}
    null = pa.scalar(None, pa.string())
    columns = {name: pc.if_else(hit, value, rows[name]) for name, value in gone.items()}
    for name in ("reason", "detail"):  # the staged table has them
        columns[name] = pc.if_else(pc.and_not(failed, hit), null, columns[name])
    listed = columns["shard"].to_pylist()
    shard = np.array([int(name.rpartition("-")[2]) if name in shards else -1 for name in listed], np.int64)
    key, sha256 = raw_digits(rows["key"], 16), raw_digits(rows["sha256"], 32)
    return _Known(units, key, sha256, shard, pa.table(columns))
