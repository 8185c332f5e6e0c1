"""Measured columns of many units in one file, so that a changed condition reads few files

    state/columns/index.json           the blocks: the units of each, in order, and what they were read from
    state/columns/<hash>.parquet       one block: the units' measurements, URLs and scores, in the order of their rows

A selection compares all rows, whatever has changed since the last one. Without blocks it reads each unit's staged table
and scores. Blocks hold what conditions name most, and no captions: those who name `caption`, `extra` or what is derived
from it read the units' own tables, and so do units that no block holds as they are.

Blocks are written on workers, once a selection is published. They follow from the tables: a block that is missing or
damaged costs reads, nothing else.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.errors import DamagedFile, Quarantined
from capstan.pipeline.ingest.job import STAGED_SCHEMA, Staged
from capstan.pipeline.score import registry
from capstan.pipeline.score.store import Columns, added, joined
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.pipeline.units import Job, Piece, Unit, run_once

log = logging.getLogger(__name__)

_FOLDER: Final = "state/columns"
_INDEX: Final = f"{_FOLDER}/index.json"
LEAST: Final = 16  # units; fewer are read one by one
_UNITS, _ROWS = 64, 100_000  # of a block, at most
_LEFT_OUT: Final = ("caption", "extra", "unit", "offset", "size", "crc32")
MEASURED: Final = [name for name in STAGED_SCHEMA.names if name not in _LEFT_OUT]  # the columns besides scores


@dataclass(frozen=True)
class Part:
    """Neighbouring units to read together: rows [start, stop) of a block for each unit; no block: their own tables."""

    units: list[Staged]
    block: str = ""
    ranges: Sequence[tuple[int, int]] = ()

    def read(self, storage: Storage, columns: list[str]) -> pa.Table:
        """Return columns of the units' rows from the block. Raises DamagedFile and FileNotFoundError."""
        table = storage.read_table(self.block, columns)
        if len(table) < max(stop for _, stop in self.ranges) or table.num_columns < len(columns):
            raise DamagedFile(storage.path(self.block), "it lacks rows or columns")
        return pa.concat_tables([table.slice(start, stop - start) for start, stop in self.ranges])


class _Write(Job):
    """The job that writes blocks. A unit of it is a block."""

    name, title = "columns-write", "columns"

    def __init__(self, storage: Storage, columns: Columns) -> None:
        self.storage, self._columns = storage, columns

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Publish the block; yield nothing."""
        tables = []
        for of, table, rows, scores in unit.spec["units"]:
            staged = Staged(of, table, "", rows, tuple(scores.items()))
            measured, scored = self.storage.read_table(table, MEASURED), joined(self.storage, staged, self._columns)
            columns = {name: measured[name] for name in MEASURED}
            tables.append(pa.table(columns | {name: scored[name] for name in scored.column_names}))
        self.storage.write(_file(unit.id), parquet_bytes(pa.concat_tables(tables)))
        yield from ()

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        return {}


class ColumnBlocks:
    """The blocks that hold units as they are, with the columns of the recipe's scorers."""

    def __init__(self, storage: Storage, columns: Columns) -> None:
        self._of = _kind(columns)
        self._places: dict[str, tuple[str, int]] = {}  # a unit as it is → its block, and its first row there
        for block, units in _read(storage).get(self._of, {}).items():
            starts = itertools.accumulate((rows for _, rows in units), initial=0)
            self._places |= {unit: (_file(block), start) for (unit, _), start in zip(units, starts, strict=False)}

    def parts(self, units: Sequence[Staged], rows: int) -> Iterator[Part]:
        """Yield the units in order: those of one block together, and others in groups of about `rows` rows."""
        placed = [(unit, *self._places.get(_as_it_is(unit), ("", 0))) for unit in units]
        for block, found in itertools.groupby(placed, key=lambda one: one[1]):
            if block:
                own = list(found)
                ranges = [(start, start + unit.rows) for unit, _, start in own]
                yield Part([unit for unit, _, _ in own], block, ranges)
                continue
            held: list[Staged] = []
            for unit, _, _ in found:
                held.append(unit)
                if sum(one.rows for one in held) >= rows:
                    yield Part(held)
                    held = []
            if held:
                yield Part(held)


def cover(recipe: Recipe, storage: Storage, units: Sequence[Staged], *, progress: bool = True) -> None:
    """Write blocks of the units that no block holds as they are, if these are many."""
    columns = registry.columns(recipe)
    index, of, there = _read(storage), _kind(columns), set(storage.names(_FOLDER))
    now = {_as_it_is(unit) for unit in units}
    held: dict[str, list[tuple[str, int]]] = {}
    for block, own in index.get(of, {}).items():
        if _file(block) in there and 2 * sum(unit in now for unit, _ in own) > len(own):
            held[block] = own
    known = {unit for own in held.values() for unit, _ in own}
    if sum(_as_it_is(unit) not in known for unit in units) < LEAST:
        return
    work, made = list[Unit](), dict[str, list[tuple[str, int]]]()
    for group in _groups(units, known):
        listed = [(_as_it_is(unit), unit.rows) for unit in group]
        made[block := fingerprint([of, listed])] = listed
        spec = [[unit.unit, unit.table, unit.rows, dict(unit.scores)] for unit in group]
        work.append(Unit(block, {"units": spec}))
    try:
        run_once(_Write(storage, columns), work, recipe.resources, progress=progress)
    except Quarantined as error:  # their units are read one by one
        log.warning("%s", error)
        return
    _write(storage, {of: held | made})


def forget(storage: Storage, units: Collection[str] | None) -> None:
    """Remove the blocks that hold any of these units (None: all): rows of theirs are taken down. May be repeated."""
    left: dict[str, dict[str, list[tuple[str, int]]]] = {}
    index = _read(storage) if units is not None else {}
    for of, blocks in index.items():
        left[of] = {
            block: own
            for block, own in blocks.items()
            if not any(unit.partition(" ")[0] in (units or ()) for unit, _ in own)
        }
    if left != index or units is None:
        _write(storage, left)
    else:
        _sweep(storage, left)


_Index = Mapping[str, Mapping[str, list[tuple[str, int]]]]  # kind of columns → block → its units and their rows


def _groups(units: Sequence[Staged], known: Collection[str]) -> Iterator[list[Staged]]:
    """Yield neighbouring units that are not `known`, as many as a block may hold."""
    for is_known, found in itertools.groupby(units, key=lambda unit: _as_it_is(unit) in known):
        held: list[Staged] = []
        for unit in () if is_known else found:
            if held and (len(held) == _UNITS or sum(one.rows for one in held) + unit.rows > _ROWS):
                yield held
                held = []
            held.append(unit)
        if held:
            yield held


def _as_it_is(unit: Staged) -> str:
    """Return the unit's name and a hash of what its rows are read from."""
    return f"{unit.unit} {fingerprint([unit.table, unit.rows, sorted(unit.scores)])}"


def _kind(columns: Columns) -> str:
    """Return a hash of the columns of blocks."""
    fields = {scorer: [str(field) for field in own] for scorer, own in columns.items()}
    return fingerprint([MEASURED, fields, [str(field) for field in added(columns)]])


def _file(block: str) -> str:
    return f"{_FOLDER}/{block}.parquet"


def _read(storage: Storage) -> _Index:
    """Return the index; an empty one if there is none, or a damaged one."""
    try:
        record = storage.read_json(_INDEX, "")
        return {
            str(of): {str(block): [(str(unit), int(rows)) for unit, rows in own] for block, own in blocks.items()}
            for of, blocks in record.items()
        }
    except FileNotFoundError:
        return {}
    except (DamagedFile, AttributeError, TypeError, ValueError) as error:
        log.warning("%s is damaged (%s): the units' own tables are read", storage.path(_INDEX), error)
        return {}


def _write(storage: Storage, index: _Index) -> None:
    """Publish the index; remove what it does not name."""
    storage.write(_INDEX, json.dumps(index, separators=(",", ":"), sort_keys=True).encode())
    _sweep(storage, index)


def _sweep(storage: Storage, index: _Index) -> None:
    named = {_INDEX, *(_file(block) for blocks in index.values() for block in blocks)}
    storage.delete(*(name for name in storage.names(_FOLDER) if name not in named))
