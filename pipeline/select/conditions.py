"""Evaluate the recipe's SQL conditions on measured rows.

The result is the first condition that a row does not meet, and the values that sampling steps need. A condition sees
one row at a time: the columns of `STAGED_SCHEMA` (without offset and size), those of the recipe's scorers, `license` if
the recipe sets `source.license`, and `domain`, the host of the URL. `extra` is JSON, so extra->>'$.year' = '1999' tests
a column of the source. Rows can therefore be evaluated in blocks, in order and in little memory, and only the columns
that conditions name are read.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Condition, Recipe
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.image.phash import read_colours
from capstan.pipeline.ingest.job import STAGED_SCHEMA, Staged
from capstan.pipeline.records import REMOVED
from capstan.pipeline.score import registry
from capstan.pipeline.score.store import added, joined
from capstan.pipeline.select.column_blocks import MEASURED, Part
from capstan.pipeline.select.derived import CLIP_FACTS, derived_columns, derived_fields
from capstan.pipeline.select.licenses import LICENSE
from capstan.pipeline.select.review import reviews_of
from capstan.pipeline.source.blocklist import blocked
from capstan.pipeline.sql import lock, open_sealed, parse, refuse_costly_calls, walk
from capstan.pipeline.storage import Storage

log = logging.getLogger(__name__)

# A row's step; n > 0: it does not meet the n-th condition. A row that was kept until it was taken down still holds its
# place (TOMBSTONE), so that its neighbours stay in their shards and its duplicates stay out.
TOMBSTONE, BLOCKED, FAILED, PASSED = -3, -2, -1, 0
HELD_PLACE: Final = "kept"  # `detail` of such a row in its staged table

_BASE: Final = [name for name in STAGED_SCHEMA.names if name not in ("offset", "size", "crc32")]
_DOMAIN: Final = "domain"
# The host in lower case, without user and port: https://user@WWW.Example.org:443/a → www.example.org
_DOMAIN_SQL: Final = r"lower(regexp_extract(url, '^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#:]+)', 1))"
_MEMORY_LIMIT: Final = "1GB"
_OTHER_ROWS: Final = "use the row's own columns only; at_most, balance and top compare rows"
_ALWAYS: Final = ["key", "reason", "detail", "original_width", "original_height", "sha256", "phash"]


@dataclass(frozen=True)
class QueryResult:
    """The evaluated conditions of n rows, in order.

    `step` is defined above; `key` and `sha256` are 16 and 32 raw bytes; `area` is the source's, in pixels. `groups`
    maps a condition's number to the hashed value of its `per` or `balance`, `ranks` to the value of its `by` (NaN for
    null).
    """

    step: npt.NDArray[np.int16]
    key: npt.NDArray[np.bytes_]
    sha256: npt.NDArray[np.bytes_]
    area: npt.NDArray[np.int64]
    phash: npt.NDArray[np.uint64]
    colours: npt.NDArray[np.uint8] | None  # [n, phash.COLOUR_BYTES]; None: not requested
    groups: dict[int, npt.NDArray[np.uint64]]
    ranks: dict[int, npt.NDArray[np.float64]]


def check_conditions(recipe: Recipe) -> None:
    """Raise RecipeError for a condition that names an unknown column, is not SQL, or refers to other rows."""
    columns = registry.columns(recipe)
    more = [*derived_fields(recipe), *added(columns)]
    schema = pa.schema([*(STAGED_SCHEMA.field(name) for name in _BASE), *more])
    with _connect() as db:
        # A row of nulls rather than none, so that constants are cast: width > 'a' fails.
        db.register("block", pa.table({field.name: pa.nulls(1, field.type) for field in schema}))
        for condition in recipe.select:
            for key, sql in condition.expressions.items():
                try:
                    tree = parse(db, sql)
                    if tree is None:
                        db.extract_statements(f"SELECT ({sql}\n)")  # raises where the syntax is wrong
                        hint = "write one expression, without other clauses, and without ; between statements"
                        raise RecipeError(_field(condition, key), "is not one SQL expression", hint)
                    refuse_costly_calls(tree, _field(condition, key))
                    if any(node["class"] in ("SUBQUERY", "WINDOW") for node in walk(tree)):
                        raise RecipeError(_field(condition, key), "refers to other rows", _OTHER_ROWS)
                    value = f"({sql}\n)::DOUBLE" if key == "by" else f"({sql}\n)"
                    found = db.sql(f"SELECT reason, {value} FROM {_rows(schema.names)}")  # with reason: no aggregates
                    kind = str(found.types[1])
                    found.fetchall()
                except duckdb.Error as error:
                    raise _explain(condition, key, error, schema.names) from None
                if key == "where" and kind != "BOOLEAN":
                    hint = "write a comparison, e.g. least(width, height) >= 200"
                    raise RecipeError(_field(condition, key), f"returns {kind.lower()}, not true or false", hint)


class Query:
    """All conditions of the recipe as one query. It may run in several threads at once."""

    def __init__(self, recipe: Recipe, storage: Storage) -> None:
        conditions: Sequence[Condition] = recipe.select
        self._storage, self._columns = storage, registry.columns(recipe)
        self._db, self._conditions = _connect(), conditions
        self._recipe, self._derived = recipe, derived_fields(recipe)
        self._unwanted, self._reviews = blocked(recipe, storage), reviews_of(recipe, storage)
        self._coloured = recipe.dedup.perceptual is not None and recipe.dedup.colours is not None
        cases, self._groups, self._ranks = "", list[int](), list[int]()
        taken_down = f"CASE WHEN reason = '{REMOVED}' THEN if(detail = '{HELD_PLACE}', {TOMBSTONE}, {BLOCKED})"
        expressions = [f"{taken_down} WHEN reason <> '' THEN {FAILED}"]
        for number, condition in enumerate(conditions, 1):
            if condition.where is not None:
                cases += f" WHEN NOT coalesce(({condition.where}\n), false) THEN {number}"
        expressions[0] += f"{cases} ELSE {PASSED} END::SMALLINT AS step"
        for number, condition in enumerate(conditions, 1):
            if group := condition.per or condition.balance:
                expressions.append(f"CASE WHEN reason = '' THEN hash(({group}\n)) ELSE 0 END AS group_{number}")
                self._groups.append(number)
            if condition.by:
                expressions.append(f"CASE WHEN reason = '' THEN ({condition.by}\n)::DOUBLE END AS rank_{number}")
                self._ranks.append(number)
        self._select = "SELECT " + ", ".join(expressions)
        self._named = self._columns_named()

    def _columns_named(self) -> set[str]:
        """Return the columns that the conditions name; only these are read."""
        named = {
            name.casefold()
            for condition in self._conditions
            for sql in condition.expressions.values()
            for node in walk(parse(self._db, sql))
            for name in node.get("column_names", ())
        }
        known = [*_BASE, *(field.name for field in added(self._columns))]
        needed = {"url"} if _DOMAIN in named or self._unwanted else set()
        if derived := named & {field.name for field in self._derived}:
            needed |= {"extra", *derived}
        return {name for name in known if name in named} | needed | ({"colours"} if self._coloured else set())

    def close(self) -> None:
        """Close its database."""
        self._db.close()

    def run(self, part: Part) -> QueryResult:
        """Return the result for the rows of a part. Raises RecipeError for a condition that fails."""
        scores = [field.name for field in added(self._columns) if field.name in self._named]
        if part.block and not any(name in self._named for name in _BASE if name not in MEASURED):
            names = [name for name in MEASURED if name in self._named or name in _ALWAYS]
            try:
                return self._result(part.read(self._storage, names + scores))
            except (DamagedFile, FileNotFoundError) as error:
                log.warning("%s: the units' own tables are read", error)
        return self._result(pa.concat_tables([self._read(unit) for unit in part.units]))

    def empty(self) -> QueryResult:
        """Return the result for no rows."""
        more = [*self._derived, *added(self._columns)]
        return self._result(pa.schema([*STAGED_SCHEMA, *more]).empty_table())

    def _read(self, unit: Staged) -> pa.Table:
        rows = self._storage.read_table(unit.table, [name for name in _BASE if name in self._named or name in _ALWAYS])
        scores = joined(self._storage, unit, self._columns, self._named)
        for field in scores.schema:
            rows = rows.append_column(field, scores[field.name])
        derived = [field for field in self._derived if field.name in self._named]
        columns = derived_columns(rows["extra"], self._recipe, self._named) if derived else {}
        for field in derived:
            rows = rows.append_column(field, columns[field.name])
        return rows

    def _result(self, rows: pa.Table) -> QueryResult:
        values = self._execute(rows)
        size = rows["original_width"].to_numpy().astype(np.int64)
        step = values["step"].to_numpy()
        for number, rejected in self._reviews.items():
            hit = pc.is_in(rows["key"], rejected).to_numpy()
            step = np.where(hit & ((step == PASSED) | (step > number)), np.int16(number), step)
        if self._unwanted:
            hits = self._unwanted.hits(*(rows[name].to_pylist() for name in ("key", "url", "sha256")))
            step = np.where(np.array(hits, bool) & (step >= FAILED), np.int16(BLOCKED), step)
        return QueryResult(
            step,
            raw_digits(rows["key"], 16),
            raw_digits(rows["sha256"], 32),
            size * rows["original_height"].to_numpy(),
            rows["phash"].to_numpy(),
            read_colours(rows["colours"]) if self._coloured else None,
            {number: values[f"group_{number}"].to_numpy() for number in self._groups},
            {number: values[f"rank_{number}"].to_numpy() for number in self._ranks},
        )

    def _execute(self, rows: pa.Table) -> pa.Table:
        """Run the query on these rows; results are in their order. Blocks run concurrently, each on its own cursor."""
        with self._db.cursor() as cursor:
            cursor.register("block", rows)
            try:
                return cursor.sql(f"{self._select} FROM {_rows(rows.column_names)}").to_arrow_table()
            except duckdb.Error as error:
                raise _explain(*self._culprit(cursor, rows), error, rows.column_names) from None

    def _culprit(self, db: duckdb.DuckDBPyConnection, rows: pa.Table) -> tuple[Condition, str]:
        """Return the first condition that fails on the rows by itself."""
        candidates = [
            (condition, key, sql) for condition in self._conditions for key, sql in condition.expressions.items()
        ]
        for condition, key, sql in candidates:
            value = f"({sql}\n)::DOUBLE" if key == "by" else f"({sql}\n)"
            try:
                db.sql(f"SELECT count({value}) FROM {_rows(rows.column_names)} WHERE reason = ''").fetchall()
            except duckdb.Error:
                return condition, key
        return candidates[-1][:2]


def _rows(columns: Sequence[str]) -> str:
    """Return the FROM clause: the rows with derived columns, which DuckDB computes only if a condition names them."""
    return f"(SELECT *, {_DOMAIN_SQL} AS {_DOMAIN} FROM block)" if "url" in columns else "block"


def raw_digits(column: pa.ChunkedArray, width: int) -> npt.NDArray[np.bytes_]:
    """Convert hexadecimal digits to `width` raw bytes; zeros for empty values, as failed rows have no hash."""
    text = column.combine_chunks()
    if isinstance(text, pa.ChunkedArray):
        text = pa.concat_arrays(text.chunks) if text.num_chunks else pa.array([], pa.string())
    _, offsets, data = text.buffers()
    ends = (
        np.frombuffer(offsets, np.int32)[text.offset : text.offset + len(text) + 1] if len(text) else np.zeros(1, int)
    )
    there = np.diff(ends) > 0
    raw = np.zeros(len(text), f"S{width}")
    digits = data[int(ends[0]) : int(ends[-1])].to_pybytes().decode() if data is not None else ""
    raw[there] = np.frombuffer(bytes.fromhex(digits), f"S{width}")
    return raw


def _connect() -> duckdb.DuckDBPyConnection:
    """Open a database that sees the registered rows and nothing else."""
    db = open_sealed({"memory_limit": _MEMORY_LIMIT})
    lock(db)
    return db


def _field(condition: Condition, key: str) -> str:
    return f"select.{condition.name}.{key}"


def _explain(condition: Condition, key: str, error: duckdb.Error, columns: Sequence[str]) -> RecipeError:
    problem, hint = _reason(str(error), columns, condition.expressions[key])
    return RecipeError(_field(condition, key), problem, hint)


def _reason(message: str, columns: Sequence[str], sql: str) -> tuple[str, str]:
    """Return (problem, hint) for DuckDB's message about an expression; its own suggestions are passed on."""
    line = message.splitlines()[0].rstrip("!.")
    if unknown := re.search(r'column "([^"]+)" not found', line):
        return f"no column {unknown[1]!r}", _hint_for_column(unknown[1], [*columns, _DOMAIN])
    if unknown := re.search(r"Function with name (\S+) does not exist", line):
        near = re.search(r'Did you mean "([^"]+)"', message)
        return f"no function {unknown[1]!r}", f"did you mean {near[1]}?" if near else "use a function of DuckDB"
    if "GROUP BY" in line:  # an aggregate
        return "refers to other rows", _OTHER_ROWS
    if 'near ")"' in line and ")" not in sql:
        return "the SQL ends too early", "complete it, e.g. least(width, height) >= 200"
    return line.partition(". You might")[0], "correct the SQL"


def _hint_for_column(unknown: str, known: Sequence[str]) -> str:
    if unknown.casefold() == LICENSE.name:
        return "set source.license to the source's column that holds the licences"
    if unknown.casefold() in {field.name for field in CLIP_FACTS}:
        return "set source.parts to the parts of the clips, e.g. [mp4, flac]"
    measured = {name: scorer for name, scorer in registry.scorer_of().items() if name not in known}
    near = difflib.get_close_matches(unknown, [*known, *measured], n=3, cutoff=0.6)
    if near and near[0] in measured:
        return f"add score.{measured[near[0]]}, which measures {near[0]}"
    near = [name for name in near if name in known]
    return f"did you mean {' or '.join(near)}?" if near else f"columns: {', '.join(known)}"
