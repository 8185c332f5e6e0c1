"""Kept rows of earlier batches, in sorted runs, which the rows of new batches are compared with

    state/duplicates/index.json           the runs: the ledger tables of each, with their SHA-256, and the staged tables
    state/duplicates/<hash>.parquet       a run: rows that passed all conditions, sorted by the hash of their files
    state/duplicates/meet-<number>        what new rows found, while a selection lasts

A run belongs to ledger tables of one batch, and is named after their sums. One whose tables have changed is not used,
and is removed when runs are next written. Runs follow from the ledger: for tables without a run, or with a lost or
damaged one, the same rows are read from the tables themselves. Duplicates that are identical to another row that passed
are left out, since that row is there.

How new rows meet runs is in `meeting`.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.dataset.shards import Manifest
from capstan.pipeline.dataset.sorted_runs import HASH, write_run
from capstan.pipeline.errors import DamagedFile, Quarantined
from capstan.pipeline.image.phash import COLOUR_BYTES, read_colours
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.records import DUPLICATE, KEPT, REMOVED
from capstan.pipeline.select.arrays.large_arrays import Ints
from capstan.pipeline.select.conditions import HELD_PLACE, raw_digits
from capstan.pipeline.select.near_duplicates import PERCEPTUAL, REASONS
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Unit, run_once

log = logging.getLogger(__name__)

FOLDER: Final = "state/duplicates"
_INDEX: Final = f"{FOLDER}/index.json"
LEAST: Final = 16  # ledger tables; fewer are read by who asks
_TABLES, _ROWS = 64, 250_000  # of a run, at most
_READ: Final = [
    "key", "outcome", "reason", "detail", "original_width", "original_height", "sha256", "phash", "colours"
]  # fmt: skip
MADE: Final = b"capstan.run"  # metadata of a run: its name, which is a hash of what it was made from
SCHEMA: Final = pa.schema(
    [
        HASH,
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("root", pa.binary(16), nullable=False),  # key of the row, or of the one that it repeats
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("phash", pa.uint64(), nullable=False),
        pa.field("colours", pa.binary(COLOUR_BYTES), nullable=False),
        pa.field("area", pa.int64(), nullable=False),
        pa.field("rank", pa.int64(), nullable=False),  # place in the ledger tables
    ]
)


@dataclass(frozen=True)
class Table:
    """A ledger table of a unit, and the staged table that it was made from."""

    unit: str
    name: str
    sha256: str
    staged: str
    rows: int

    @property
    def plain(self) -> list[str]:
        return [self.name, self.sha256, self.staged]


def tables_of(manifest: Manifest, units: Sequence[Staged]) -> list[Table]:
    """Return the ledger tables of units that the manifest lists, in the order of units."""
    entries = {entry.name: entry for entry in manifest.ledger}
    found = [(unit, entries.get(f"unit-{unit.unit}")) for unit in units]
    return [Table(unit.unit, one.table, one.sha256, unit.table, unit.rows) for unit, one in found if one]


def groups_of(tables: Sequence[Table], places: Mapping[str, str]) -> Iterator[tuple[str, list[Table]]]:
    """Yield runs with their tables, in order, and "" with groups of tables that have none; each is of one batch.

    `places` has the run of each table by its sum.
    """
    for (run, _), own in itertools.groupby(
        tables, lambda one: (places.get(one.sha256, ""), one.unit.partition("-")[0])
    ):
        held: list[Table] = []
        for table in own:
            if not run and held and (len(held) == _TABLES or sum(one.rows for one in held) + table.rows > _ROWS):
                yield run, held
                held = []
            held.append(table)
        yield run, held


def listed(storage: Storage, manifest: Manifest, units: Sequence[Staged]) -> Iterator[tuple[str, list[Table]]]:
    """Yield the runs of a dataset with their tables, in order, and "" with groups of tables that have none."""
    tables = tables_of(manifest, units)
    return groups_of(tables, _places(_Index.read(storage).current(tables)))


def file_of(run: str) -> str:
    """Return the name of a run's file."""
    return f"{FOLDER}/{run}.parquet"


# Writing -------------------------------------------------------------------------------------------------------------


def rows_of(storage: Storage, tables: Sequence[Sequence[str]]) -> pa.Table:
    """Return a run's rows (SCHEMA) from ledger tables: name, SHA-256 and staged table of each. Raises DamagedFile."""
    found, start = [SCHEMA.empty_table()], 0
    for name, sha256, staged in tables:
        rows = storage.read_table(name, _READ, sha256=sha256)
        kept = pc.equal(rows["outcome"], KEPT)
        if pc.any(pc.equal(rows["reason"], REMOVED)).as_py():  # some of these may hold their place
            own = storage.read_table(staged, ["reason", "detail"])
            kept = pc.or_(kept, pc.and_(pc.equal(own["reason"], REMOVED), pc.equal(own["detail"], HELD_PLACE)))
        near = pc.and_(pc.equal(rows["outcome"], DUPLICATE), pc.equal(rows["reason"], REASONS[PERCEPTUAL]))
        places = np.flatnonzero(np.asarray(pc.or_(kept, near)))
        found.append(_as_run(rows.take(places), np.asarray(kept)[places], start + places))
        start += len(rows)
    return pa.concat_tables(found)


def _as_run(rows: pa.Table, kept: npt.NDArray[np.bool_], rank: Ints) -> pa.Table:
    sums = raw_digits(rows["sha256"], 32)
    root = pc.if_else(pa.array(kept, pa.bool_()), rows["key"], rows["detail"])
    area = rows["original_width"].to_numpy().astype(np.int64) * rows["original_height"].to_numpy()
    colours = read_colours(rows["colours"])
    columns = {
        "hash": hashes_of(sums), "sha256": _binary(sums), "root": _binary(raw_digits(root, 16)), "kept": kept,
        "phash": rows["phash"].combine_chunks(), "colours": _binary(colours), "area": area, "rank": rank,
    }  # fmt: skip
    return pa.table(columns, schema=SCHEMA)


def hashes_of(sums: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint64]:
    """Return the first eight bytes of SHA-256 sums, 32 raw bytes each, as numbers."""
    return np.ascontiguousarray(sums).view(">u8")[::4].astype(np.uint64)


def _binary(values: npt.NDArray[Any]) -> pa.Array:
    """Return rows of bytes as binary of one width."""
    width = values.dtype.itemsize if values.ndim == 1 else values.shape[1]
    return pa.Array.from_buffers(
        pa.binary(width), len(values), [None, pa.py_buffer(np.ascontiguousarray(values).tobytes())]
    )


def raw(column: pa.ChunkedArray, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return binary of one width as an array of `dtype`, of which a row may have several."""
    width, parts = column.type.byte_width, [np.zeros(0, np.uint8)]
    for chunk in column.chunks:
        parts.append(
            np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        )
    return np.concatenate(parts).view(dtype)


class _Write(Job):
    """The job that writes runs. A unit of it is a run."""

    name, title = "duplicates-write", "kept rows"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Publish the run; yield nothing."""
        rows = rows_of(self.storage, unit.spec["tables"]).replace_schema_metadata({MADE: unit.id})
        write_run(self.storage, file_of(unit.id), rows)
        yield from ()

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        return {}


def cover(
    recipe: Recipe,
    storage: Storage,
    manifest: Manifest,
    units: Sequence[Staged],
    *,
    settled: bool = True,
    progress: bool = True,
) -> None:
    """Write runs of the ledger tables that have none, if these are many; remove runs of tables that have changed.

    To be called when rows have come. Runs whose tables a changed condition has rewritten are not needed before.

    `settled` (select.decide.Decisions) is noted if rows were taken down.
    """
    tables, held = tables_of(manifest, units), _Index.read(storage)
    index = _Index(held.current(tables), manifest.selection if settled and removed(manifest) else "")
    places = _places(index.runs)
    if sum(one.sha256 not in places for one in tables) < LEAST:
        if index != held:
            index.write(storage)
        return
    work, made = list[Unit](), dict[str, dict[str, str]]()
    for run, own in groups_of(tables, places):
        if not run:
            made[name := fingerprint([str(SCHEMA), [one.plain for one in own]])] = {one.unit: one.sha256 for one in own}
            work.append(Unit(name, {"tables": [one.plain for one in own]}))
    try:
        run_once(_Write(storage), work, recipe.resources, progress=progress)
    except Quarantined as error:  # their tables are read by who asks
        log.warning("%s", error)
        return
    _Index({**index.runs, **made}, index.settled).write(storage)


def forget(storage: Storage, units: Collection[str] | None) -> None:
    """Remove the runs that hold rows of any of these units (None: all). May be repeated."""
    held = _Index.read(storage) if units is not None else _Index({})
    left = {run: own for run, own in held.runs.items() if own.keys().isdisjoint(units or ())}
    named = {_INDEX, *map(file_of, left)}
    if left != held.runs or not named.issuperset(storage.names(FOLDER)):
        _Index(left).write(storage)


def removed(manifest: Manifest) -> bool:
    """Return whether rows of a dataset were taken down, or are in a blocklist."""
    return any(step["step"] == REMOVED for step in manifest.funnel)


def is_settled(storage: Storage, manifest: Manifest) -> bool:
    """Return whether all rows that were taken down and hold their place would be kept.

    The ledger does not say so: a row that changed settings made a duplicate is as removed as any.
    """
    return not removed(manifest) or _Index.read(storage).settled == manifest.selection


Runs = Mapping[str, Mapping[str, str]]  # run → its units, and the SHA-256 of their ledger tables


@dataclass(frozen=True)
class _Index:
    """The runs; and the selection whose removed rows are known to be settled, or ""."""

    runs: Runs
    settled: str = ""

    @classmethod
    def read(cls, storage: Storage) -> _Index:
        """Return the index; an empty one if there is none, or a damaged one."""
        try:
            record = storage.read_json(_INDEX, "")
            runs = {
                str(run): {str(unit): str(sum_) for unit, sum_ in own.items()} for run, own in record["runs"].items()
            }
            return cls(runs, str(record["settled"]))
        except FileNotFoundError:
            return cls({})
        except (DamagedFile, AttributeError, KeyError, TypeError, ValueError) as error:
            log.warning("%s is damaged (%s): the ledger's tables are read", storage.path(_INDEX), error)
            return cls({})

    def write(self, storage: Storage) -> None:
        """Publish the index; remove what it does not name."""
        storage.write(_INDEX, json.dumps(vars(self), separators=(",", ":"), sort_keys=True).encode())
        named = {_INDEX, *map(file_of, self.runs)}
        storage.delete(*(name for name in storage.names(FOLDER) if name not in named))

    def current(self, tables: Sequence[Table]) -> Runs:
        """Return the runs whose tables are all as they were."""
        now = {one.sha256 for one in tables}
        return {run: own for run, own in self.runs.items() if now.issuperset(own.values())}


def _places(runs: Runs) -> dict[str, str]:
    return {sha256: run for run, own in runs.items() for sha256 in own.values()}
