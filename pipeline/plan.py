"""Rows of the source → units of work: without repeats, sorted by key, cut into units. The order is made once, here.

    state/plan/batch-0000/unit-0000-000000.parquet    records.PLAN_SCHEMA, sorted by key
    state/plan/batch-0000/batch.json                  the batch: its units; written last
    state/plan/source.json                            the source as it was planned last, so that planning can be skipped

Rows whose key an earlier batch holds are dropped; the others make a new batch. Nothing that exists moves. Sorting is
DuckDB's, in bounded memory, with its spill on the local disk.
"""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Recipe
from pipeline.progress import Progress
from pipeline.records import PLAN_SCHEMA
from pipeline.sources import Rows
from pipeline.storage import Storage

log = logging.getLogger(__name__)

MEMORY_LIMIT = "1GB"
UNIT_BYTES = 256 << 20  # of embedded pictures in a unit
_SOURCE = "state/plan/source.json"


@dataclass(frozen=True)
class PlannedUnit:
    """A unit of a batch: `id` is "0000-000000" (batch, number), its table is `table`."""

    batch: int
    number: int
    rows: int

    @property
    def id(self) -> str:
        return f"{self.batch:04d}-{self.number:06d}"

    @property
    def table(self) -> str:
        return f"state/plan/batch-{self.batch:04d}/unit-{self.id}.parquet"


@dataclass(frozen=True)
class Plan:
    """All units of all batches in order; `read` rows of the source as it is now, `repeats` of them with a key twice."""

    units: list[PlannedUnit]
    read: int
    repeats: int

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)


def read_plan(storage: Storage) -> Plan:
    """The plan as it stands in `storage`, without looking at the source."""
    units: list[PlannedUnit] = []
    for batch in itertools.count():  # by name: a listing would show every unit's table, too
        try:
            written = json.loads(storage.read(_batch_name(batch)))
        except FileNotFoundError:
            break
        units += [PlannedUnit(batch, number, rows) for number, rows in enumerate(written["units"])]
    seen = json.loads(storage.read(_SOURCE)) if storage.exists(_SOURCE) else {"read": 0, "repeats": 0}
    return Plan(units, seen["read"], seen["repeats"])


def _batch_name(batch: int) -> str:
    return f"state/plan/batch-{batch:04d}/batch.json"


def plan(recipe: Recipe, storage: Storage, *, progress: bool = True) -> Plan:
    """Add a batch for the rows of the source that no batch holds yet, and give the whole plan.

    Raises RecipeError for a source that cannot be read.
    """
    rows = Rows(recipe)
    seen = json.loads(storage.read(_SOURCE)) if storage.exists(_SOURCE) else {}
    if seen.get("signature") == rows.signature:
        return read_plan(storage)
    before = read_plan(storage)
    batch = max((unit.batch for unit in before.units), default=-1) + 1
    with (
        tempfile.TemporaryDirectory(prefix="capstan-plan-") as scratch,
        Progress("plan", None, unit="rows", enabled=progress) as bar,
        _Sorter(Path(scratch)) as sorter,
    ):
        for table in rows.tables():
            sorter.add(table)
            bar.advance(len(table))
        for unit in before.units:
            sorter.drop(storage.read_table(unit.table, ["key"]))
        units = _write_batch(sorter, batch, recipe.unit.rows, storage)
        read, repeats = sorter.rows, sorter.repeats
    if units:
        written = json.dumps({"batch": batch, "units": [unit.rows for unit in units]})
        storage.write(_batch_name(batch), written.encode())
    record = {"signature": rows.signature, "read": read, "repeats": repeats}
    storage.write(_SOURCE, json.dumps(record).encode())
    return Plan(before.units + units, read, repeats)


class _Sorter:
    """Rows in any order → rows by key, each key once, without those dropped."""

    def __init__(self, scratch: Path) -> None:
        self.rows = self.repeats = 0
        self._db = duckdb.connect(str(scratch / "rows.db"))
        self._db.execute(f"SET memory_limit = '{MEMORY_LIMIT}'")
        self._db.execute(f"SET temp_directory = '{scratch / 'spill'}'")
        self._db.execute("SET preserve_insertion_order = false")
        self._db.register("schema_only", PLAN_SCHEMA.empty_table())
        self._db.execute("CREATE TABLE rows AS SELECT * FROM schema_only")
        self._db.execute("CREATE TABLE known (key VARCHAR)")

    def __enter__(self) -> _Sorter:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def add(self, table: pa.Table) -> None:
        self.rows += len(table)
        self._insert("rows", table)

    def drop(self, keys: pa.Table) -> None:
        """Leave out rows with these keys."""
        self._insert("known", keys)

    def _insert(self, name: str, table: pa.Table) -> None:
        self._db.register("incoming", table)
        self._db.execute(f"INSERT INTO {name} SELECT * FROM incoming")
        self._db.unregister("incoming")

    def sorted(self) -> Iterator[pa.Table]:
        """Tables of PLAN_SCHEMA. Of rows with one key the first by the other columns stays, whatever came first."""
        distinct = "SELECT count(*) - count(DISTINCT key) FROM rows"
        self.repeats = self._db.execute(distinct).fetchall()[0][0]
        ordered = "SELECT * FROM rows ANTI JOIN known USING (key) ORDER BY key, extra, url, caption"
        last = None
        for batch in self._db.sql(ordered).to_arrow_reader(2048):
            table = pa.Table.from_batches([batch]).cast(PLAN_SCHEMA)
            keys = table["key"].combine_chunks()
            previous = pa.concat_arrays([pa.array([last], pa.string()), keys[:-1]])
            last = keys[-1].as_py()
            fresh = pc.fill_null(pc.not_equal(keys, previous), True)
            yield table.filter(fresh)


def _write_batch(sorter: _Sorter, batch: int, unit_rows: int, storage: Storage) -> list[PlannedUnit]:
    units: list[PlannedUnit] = []
    for table in _cut(sorter.sorted(), unit_rows):
        unit = PlannedUnit(batch, len(units), len(table))
        storage.write_table(unit.table, table)
        units.append(unit)
    return units


def _cut(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Tables of `rows` rows (the last may have fewer), or fewer where embedded pictures fill UNIT_BYTES before."""
    held: list[pa.Table] = []
    count = size = 0
    for table in tables:
        while len(table):
            sizes = size + np.cumsum(pc.fill_null(pc.binary_length(table["image"]), 0).to_numpy(), dtype=np.int64)
            fits = int(np.searchsorted(sizes, UNIT_BYTES)) + 1
            take = table.slice(0, min(rows - count, fits))
            table = table.slice(len(take))
            held.append(take)
            count, size = count + len(take), int(sizes[len(take) - 1])
            if count == rows or size >= UNIT_BYTES:
                yield pa.concat_tables(held)
                held, count, size = [], 0, 0
    if count:
        yield pa.concat_tables(held)
