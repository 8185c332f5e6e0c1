"""Dataset → one SQL table `rows`: the ledger, or staged rows if unfinished

DuckDB scans it column by column, so that neither its length nor huge captions take memory. It sees the registered rows
and no file. Rows that are not decided yet have the outcome `staged`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Final, Self

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capstan.pipeline.dataset.shards import Manifest, read_manifest
from capstan.pipeline.errors import CapstanError, DamagedFile, RecipeError, first_line
from capstan.pipeline.ingest.job import STAGED_SCHEMA, Staged, staged
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.records import DUPLICATE, FAILED, KEPT, LEDGER_SCHEMA, REJECTED, REMOVED
from capstan.pipeline.source.plan import read_plan
from capstan.pipeline.sql import lock, open_sealed
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units import MarkerLog

STAGED: Final = "staged"
MEASURED: Final = (KEPT, REJECTED, DUPLICATE, STAGED)  # the outcomes of rows that have an image
SHOWN: Final = f"outcome IN {MEASURED} AND reason <> '{REMOVED}'"  # SQL: rows whose image may be shown
_MEMORY_LIMIT: Final = "1500MB"
_UNREAD: Final = re.compile(r"stream.*?(?:IOError|Unknown error): (?P<why>.*)")  # DuckDB repeats what Arrow raised
_TEXT: Final = 400  # characters read of a text
SAMPLE: Final = 1_000_000  # rows: approximate size of the random sample of longer tables
NEAR: Final = 64  # unit files that are read whole rather than all files searched
_TEXTS: Final = ("url", "caption", "outcome", "reason", "detail")
LONG: Final = ("url", "caption", "detail")  # texts that an index leaves out
_NUMBERS: Final = ("width", "height", "original_width", "original_height", "bytes", "phash")
SHORT: Final = ("outcome", "reason", *_NUMBERS, "shard")  # what an index has of a Row, next to key and unit
PLACE: Final = "place"  # an index's column: the row's number in its unit's file


@dataclass(frozen=True)
class Row:
    """A row to show. Texts are cut; sizes are in pixels; `shard` is "" unless the row is kept."""

    key: str
    url: str
    caption: str
    outcome: str
    reason: str
    detail: str
    width: int
    height: int
    original_width: int
    original_height: int
    bytes: int
    phash: int
    unit: str
    shard: str

    @property
    def is_shown(self) -> bool:
        """Whether its image may be shown. Images that were taken down or blocked may not."""
        return self.outcome in MEASURED and self.reason != REMOVED


class Rows:
    """The rows of the dataset at `storage`, open while the `with` block runs.

    Raises RecipeError if there is neither a dataset nor a started one.
    """

    placed: tuple[str, ...] = ()  # columns that a page of these rows brings along

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.manifest = read_manifest(storage)
        plan = read_plan(storage)
        self.planned, self.coverage = plan.rows, plan.coverage()
        if self.manifest is None and not self.planned:
            raise RecipeError(storage.field, f"no dataset at {storage.url}", "run `capstan build` first")

    def __enter__(self) -> Self:
        self._scratch = scratch()
        folder = self._scratch.__enter__()  # where it spills to if memory does not suffice
        self.db = open_sealed({"memory_limit": _MEMORY_LIMIT, "temp_directory": str(folder)})
        view, schema, names = self._table()
        self._columns = schema
        self.db.register("table", self.storage.dataset(names, schema) if names else schema.empty_table())
        self.db.execute(f"CREATE VIEW rows AS {view}")
        lock(self.db)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.db.close()
        self._scratch.__exit__(kind, error, tb)

    def _table(self) -> tuple[str, pa.Schema, list[str]]:
        """Return the SQL view over `table`, the schema of `table`, and its files."""
        if self.finished:
            names = [entry.table for entry in self._manifest.ledger]
            return 'SELECT * FROM "table"', _schema(self.storage, names, LEDGER_SCHEMA), names
        marks = max(self._marks.values(), key=len, default={})
        names = [unit.table for _, unit in sorted(marks.items())]
        outcome = f"CASE reason WHEN '' THEN '{STAGED}' WHEN '{REMOVED}' THEN '{REJECTED}' ELSE '{FAILED}' END"
        view = f"SELECT *, {outcome} AS outcome, '' AS shard FROM \"table\""
        return view, _schema(self.storage, names, STAGED_SCHEMA), names

    @property
    def finished(self) -> bool:
        """Whether the rows come from the ledger; else they are those staged so far."""
        return self.manifest is not None and (self.manifest.complete or bool(self.manifest.ledger))

    @property
    def _manifest(self) -> Manifest:
        assert self.manifest is not None
        return self.manifest

    @cached_property
    def _marks(self) -> Mapping[str, Mapping[str, Staged]]:
        """Ingest job → unit → staged unit, from its markers. There is one job, unless image settings just changed."""
        names = [name.split("/")[1] for name in self.storage.names("state")]
        jobs = sorted({name for name in names if name.startswith("ingest-")})
        return {name: staged(MarkerLog(self.storage, name).read()) for name in jobs}

    def staged_units(self, unit: str) -> list[Staged]:
        """Return the staged files that may hold a unit's images."""
        return [marks[unit] for marks in self._marks.values() if unit in marks]

    @cached_property
    def conditions(self) -> dict[str, str]:
        """The recipe's conditions: name → SQL, "" for a condition without SQL."""
        listed = self.manifest.recipe.get("select", []) if self.manifest else []
        return {str(condition.get("name", "")): str(condition.get("where") or "") for condition in listed}

    @cached_property
    def columns(self) -> dict[str, str]:
        """Column → its DuckDB type."""
        view = self.db.sql("FROM rows LIMIT 0")
        return {name: str(kind) for name, kind in zip(view.columns, view.types, strict=True)}

    @cached_property
    def outcomes(self) -> dict[tuple[str, str], int]:
        """(outcome, reason) → rows, the most frequent first."""
        found = self.query("SELECT outcome, reason, count(*) FROM rows GROUP BY ALL ORDER BY 3 DESC, 1, 2")
        return {(outcome, reason): count for outcome, reason, count in found}

    @property
    def count(self) -> int:
        """Number of rows; of a finished dataset, without reading them."""
        if self.finished:
            return sum(entry.rows for entry in self._manifest.ledger)
        return sum(self.outcomes.values())

    def having(self, outcome: str) -> int:
        """Return the number of rows of an outcome."""
        return sum(count for (name, _), count in self.outcomes.items() if name == outcome)

    @cached_property
    def sample(self) -> str:
        """SQL that is true for all rows of a small table and for about a million rows of a large one.

        Keys are hashes, so the first ones are a random sample, and they are stored together.
        """
        if not self.sampled:
            return "true"
        return f"key < '{int(0x1_0000_0000 * SAMPLE / self.count):08x}'"

    @property
    def sampled(self) -> bool:
        return self.count > SAMPLE

    def query(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return what a query finds. Raises CapstanError if a file cannot be read, duckdb.Error for other reasons."""
        try:
            return self.db.execute(query, list(parameters)).fetchall()
        except duckdb.Error as error:
            if (unread := _UNREAD.search(str(error))) is None:
                raise
            why = unread["why"].partition(". Detail: Python exception")[0].rstrip(".")
            if " Fix: " in why:  # Capstan's own reader said it
                raise CapstanError(why) from None
            raise DamagedFile(self.storage.url, why) from None

    def keys(self, where: str, count: int, parameters: Sequence[Any] = (), *, order: str = "key") -> list[str]:
        """Return the keys of the first `count` rows that match the SQL `where`, ordered by the SQL `order`, then key.

        For an order other than `key`, they are taken from the sample if it has enough of them.
        """
        for among in dict.fromkeys([self.sample, "true"]):
            query = f"SELECT key FROM rows WHERE {among} AND ({where}) ORDER BY {order}, key LIMIT {count}"
            found = [key for (key,) in self.query(query, parameters)]
            if len(found) == count:
                break
        return found

    @cached_property
    def _ledger(self) -> dict[str, str]:
        """Unit → its ledger table."""
        return {entry.name.removeprefix("unit-"): entry.table for entry in self._manifest.ledger}

    def near(self, units: Collection[str], keys: Collection[str], columns: Collection[str] = ()) -> str:
        """Register the rows of `keys` in a few units of a finished dataset as a table; return its name for SQL.

        Columns that a unit does not have are null.
        """
        fields = [field for field in self.fields if not columns or field.name in columns]
        wanted = pa.array(list(keys), pa.string())
        read = functools.partial(self._rows_in, wanted=wanted, fields=fields)
        self.db.register("near", pa.concat_tables(list(ahead(read, sorted(units)))))
        return "near"

    def _rows_in(self, unit: str, wanted: pa.Array, fields: Sequence[pa.Field]) -> pa.Table:
        found = self.unit_table(unit, fields)
        return found.filter(pc.is_in(found["key"], wanted))

    @property
    def units(self) -> list[str]:
        """The units of a finished dataset, in the ledger's order."""
        return list(self._ledger)

    @property
    def fields(self) -> list[pa.Field]:
        """The columns of the rows' files."""
        return [field.with_nullable(True) for field in self._columns]

    def unit_table(self, unit: str, fields: Sequence[pa.Field]) -> pa.Table:
        """Return columns of a unit's rows, in the order of its file; nulls for a column that it does not have."""
        found = self.storage.read_table(self._ledger[unit], [field.name for field in fields])
        there, rows = set(found.column_names), len(found)
        arrays = [found[f.name].cast(f.type) if f.name in there else pa.nulls(rows, f.type) for f in fields]
        return pa.table(arrays, schema=pa.schema(fields))

    def placed_rows(self, places: Iterable[Sequence[Any]], texts: Sequence[str] = LONG) -> dict[str, Row]:
        """Return key → row of what an index found: (key, a value, unit, place, *SHORT).

        Only `texts` are read from the ledger; others are "".
        """
        by_unit: dict[str, list[Sequence[Any]]] = {}
        for place in places:
            by_unit.setdefault(place[2], []).append(place)
        fields = [field for field in self.fields if field.name in texts]
        found = {}
        read = ahead(lambda unit: self._texts_in(unit, by_unit[unit], fields), by_unit)
        for unit, written in zip(by_unit, read, strict=True):
            for text, (key, _, _, _, *short) in zip(written, by_unit[unit], strict=True):
                facts: dict[str, Any] = dict.fromkeys(LONG, "") | dict(zip(SHORT, short, strict=True))
                facts |= {name: value[:_TEXT] for name, value in text.items()}
                found[key] = Row(key=key, unit=unit, **facts)
        return found

    def _texts_in(self, unit: str, places: Sequence[Sequence[Any]], fields: Sequence[pa.Field]) -> list[dict[str, str]]:
        return self.unit_table(unit, fields).take([place[3] for place in places]).to_pylist()

    def rows(self, keys: Iterable[str], units: Collection[str] = ()) -> dict[str, Row]:
        """Return key → row for those of `keys` that exist; of a few `units`, if the caller knows which hold them."""
        wanted = sorted(set(keys))
        if not wanted:
            return {}
        needed = ("key", *_TEXTS, *_NUMBERS, "unit", "shard")
        table = self.near(units, wanted, needed) if 0 < len(units) <= NEAR and self.finished else "rows"
        columns = [f"left({name}, {_TEXT})" for name in _TEXTS] + [*_NUMBERS, "unit", "shard"]
        # As literals in the query, their range lets the scan skip files that cannot hold them.
        listed = ", ".join(map(literal, wanted))
        among = f"key BETWEEN {literal(wanted[0])} AND {literal(wanted[-1])} AND key IN ({listed})"
        found = self.query(f"SELECT key, {', '.join(columns)} FROM {table} WHERE {among}")
        return {row[0]: Row(*row) for row in found}


def _schema(storage: Storage, names: Sequence[str], least: pa.Schema) -> pa.Schema:
    """Return `least` plus the additional columns of the first and the last file of each batch."""
    batches: dict[str, list[str]] = {}
    for name in names:
        batch = re.search(r"(\d{4})-\d{6}", name)
        batches.setdefault(batch[1] if batch else name, []).append(name)
    found = [least]
    for name in dict.fromkeys(name for files in batches.values() for name in (files[0], files[-1])):
        try:
            with storage.open(name) as file:
                found.append(pq.read_schema(file).remove_metadata())
        except (pa.ArrowException, OSError) as error:
            raise DamagedFile(storage.path(name), f"cannot be read as Parquet: {first_line(error)}") from None
    return pa.unify_schemas(found, promote_options="permissive")


def quoted(column: str) -> str:
    """Quote a column's name for SQL."""
    return '"' + column.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Quote a text for SQL."""
    return "'" + text.replace("'", "''") + "'"


def recipe_text(manifest: Manifest | None) -> str:
    """Return the manifest's recipe as readable JSON."""
    return json.dumps(manifest.recipe if manifest else {}, indent=2, ensure_ascii=False)
