"""A dataset → its rows as one table that answers SQL: the ledger, or of a dataset that is not finished what is staged.

The table is called `rows`. DuckDB scans it column by column, so that neither its length nor captions of a megabyte take
memory; it sees the registered rows and no file. Rows of which nothing is decided yet have the outcome `staged`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from capstan.pipeline.dataset.shards import Manifest, read_manifest
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.ingest.job import STAGED_SCHEMA, Staged, staged
from capstan.pipeline.records import DUPLICATE, FAILED, KEPT, LEDGER_SCHEMA, REJECTED, REMOVED
from capstan.pipeline.source.plan import read_plan
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units import MarkerLog

STAGED: Final = "staged"
MEASURED: Final = (KEPT, REJECTED, DUPLICATE, STAGED)  # the outcomes of rows that have an image,
SHOWN: Final = f"outcome IN {MEASURED} AND reason <> '{REMOVED}'"  # and in SQL, those that may be looked at
_MEMORY_LIMIT: Final = "1500MB"
_TEXT: Final = 400  # characters of a text that are looked at
SAMPLE: Final = 1_000_000  # rows: of longer tables, about so many are looked at where a random sample does
_TEXTS: Final = ("url", "caption", "outcome", "reason", "detail")
_NUMBERS: Final = ("width", "height", "original_width", "original_height", "bytes", "phash")


@dataclass(frozen=True)
class Row:
    """A row that is shown. Texts are cut; sizes are in pixels; `shard` is "" unless it is kept."""

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
        """Whether it has an image that may be looked at: what was taken down, or is blocked, may not."""
        return self.outcome in MEASURED and self.reason != REMOVED


class Rows:
    """The rows of the dataset at `storage`, while the `with` block runs.

    Raises RecipeError where there is neither a dataset nor the beginning of one.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.manifest = read_manifest(storage)
        self.planned = sum(unit.rows for unit in read_plan(storage).units)
        if self.manifest is None and not self.planned:
            raise RecipeError(storage.field, f"no dataset at {storage.url}", "run `capstan build` first")

    def __enter__(self) -> Rows:
        self._scratch = scratch()
        self.db = _connect(self._scratch.__enter__())
        view, schema, names = self._table()
        self.db.register("table", self.storage.dataset(names, schema) if names else schema.empty_table())
        self.db.execute(f"CREATE VIEW rows AS {view}")
        self.db.execute("SET lock_configuration = true")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.db.close()
        self._scratch.__exit__(kind, error, tb)

    def _table(self) -> tuple[str, pa.Schema, list[str]]:
        """The view over `table`, the schema of `table`, and its files."""
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
        """Whether the ledger says what became of every row; else the rows are those that are staged so far."""
        return self.manifest is not None and (self.manifest.complete or bool(self.manifest.ledger))

    @property
    def _manifest(self) -> Manifest:
        assert self.manifest is not None
        return self.manifest

    @cached_property
    def _marks(self) -> Mapping[str, Mapping[str, Staged]]:
        """Ingest job → what its markers say, by unit. There is one job, unless image settings have just changed."""
        names = [name.split("/")[1] for name in self.storage.names("state")]
        jobs = sorted({name for name in names if name.startswith("ingest-")})
        return {name: staged(MarkerLog(self.storage, name).read()) for name in jobs}

    def staged_units(self, unit: str) -> list[Staged]:
        """Where a unit's staged images may lie."""
        return [marks[unit] for marks in self._marks.values() if unit in marks]

    @cached_property
    def conditions(self) -> dict[str, str]:
        """The recipe's conditions: name → SQL, "" for one that is not SQL."""
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
        found = self.ask("SELECT outcome, reason, count(*) FROM rows GROUP BY ALL ORDER BY 3 DESC, 1, 2")
        return {(outcome, reason): count for outcome, reason, count in found}

    @property
    def count(self) -> int:
        return sum(self.outcomes.values())

    def having(self, outcome: str) -> int:
        """Rows of an outcome."""
        return sum(count for (name, _), count in self.outcomes.items() if name == outcome)

    @cached_property
    def sample(self) -> str:
        """SQL that holds for all rows of a small table, and for about a million of a large one: keys are hashes, so
        that the first of them are a random sample, which lies together."""
        if not self.sampled:
            return "true"
        return f"key < '{int(0x1_0000_0000 * SAMPLE / self.count):08x}'"

    @property
    def sampled(self) -> bool:
        return self.count > SAMPLE

    def ask(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self.db.execute(query, list(parameters)).fetchall()

    def keys(self, where: str, count: int, parameters: Sequence[Any] = (), *, order: str = "key") -> list[str]:
        """Keys of the first `count` rows for which the SQL `where` holds, in the order of the SQL `order`, then key.

        In another order than the keys' own, they are the first of the sample, if it has as many."""
        for among in dict.fromkeys([self.sample, "true"]):
            query = f"SELECT key FROM rows WHERE {among} AND ({where}) ORDER BY {order}, key LIMIT {count}"
            found = [key for (key,) in self.ask(query, parameters)]
            if len(found) == count:
                break
        return found

    def rows(self, keys: Iterable[str]) -> dict[str, Row]:
        """The rows of these keys, those that there are."""
        wanted = sorted(set(keys))
        if not wanted:
            return {}
        columns = [f"left({name}, {_TEXT})" for name in _TEXTS] + [*_NUMBERS, "unit", "shard"]
        # As values in the query, their range lets the scan leave out the files that cannot hold them.
        listed = ", ".join(map(literal, wanted))
        among = f"key BETWEEN {literal(wanted[0])} AND {literal(wanted[-1])} AND key IN ({listed})"
        found = self.ask(f"SELECT key, {', '.join(columns)} FROM rows WHERE {among}")
        return {row[0]: Row(*row) for row in found}


def _connect(folder: Path) -> duckdb.DuckDBPyConnection:
    """A database that sees the registered rows and nothing else; what does not fit into memory goes to `folder`."""
    limits: dict[str, str | bool] = {"memory_limit": _MEMORY_LIMIT, "temp_directory": str(folder)}
    db = duckdb.connect(config={**limits, "python_enable_replacements": False})
    db.execute("SET enable_progress_bar = false; SET enable_external_access = false")
    return db


def _schema(storage: Storage, names: Sequence[str], least: pa.Schema) -> pa.Schema:
    """`least`, and the columns that the first or the last file of each batch has besides."""
    batches: dict[str, list[str]] = {}
    for name in names:
        batch = re.search(r"(\d{4})-\d{6}", name)
        batches.setdefault(batch[1] if batch else name, []).append(name)
    found = [least]
    for name in dict.fromkeys(name for files in batches.values() for name in (files[0], files[-1])):
        with storage.open(name) as file:
            found.append(pq.read_schema(file).remove_metadata())
    return pa.unify_schemas(found, promote_options="permissive")


def quoted(column: str) -> str:
    """A column's name as SQL."""
    return '"' + column.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as SQL."""
    return "'" + text.replace("'", "''") + "'"


def recipe_text(manifest: Manifest | None) -> str:
    """The recipe as the manifest tells it, for people."""
    return json.dumps(manifest.recipe if manifest else {}, indent=2, ensure_ascii=False)
