"""Score files, and their columns joined to the staged tables.

    scores/<scorer id>/recipe.json                the scorer's identity
    scores/<scorer id>/<unit>-<hash>.parquet      key, the scorer's columns, error: one row per staged row, same order

A file has the name of the staged table that it scores, so it matches that table only, row by row.
`error` explains nulls in a row that could have been scored ("" otherwise).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.score.scorer import Scorer
from capstan.pipeline.storage import Storage

ROOT: Final = "scores"
EMBEDDINGS: Final = "embeddings"  # name of the scorer that keeps them
DESCRIPTORS: Final = "descriptors"
_VECTORS: Final = {  # scorer → its column, and what to do if none are kept
    EMBEDDINGS: ("embedding", "score.clip.embeddings", "set `embeddings: true` and build again"),
    DESCRIPTORS: ("descriptor", "dedup.copies", "run `capstan score RECIPE` first (it fetches nothing)"),
}
ERROR: Final = pa.field("score_error", pa.string(), nullable=False)  # ledger column: "clip: why", "" if nothing failed


def file_name(scorer: str, staged_table: str) -> str:
    """Return the path of a scorer's file for a staged table; `scorer` is its id."""
    return f"{ROOT}/{scorer}/{PurePosixPath(staged_table).name}"


def schema(scorer: Scorer) -> pa.Schema:
    """Return the schema of a scorer's files; its identity is in their metadata."""
    fields = [pa.field("key", pa.string(), nullable=False), *scorer.columns, pa.field("error", pa.string(), False)]
    return pa.schema(fields, metadata={"capstan.scorer": json.dumps(scorer.identity, sort_keys=True)})


Columns = Mapping[str, Sequence[pa.Field]]  # scorer's name → its ledger columns


def added(columns: Columns) -> list[pa.Field]:
    """Return all columns that the scorers add to the ledger and to the shards' tables."""
    return [*(field for fields in columns.values() for field in fields), *([ERROR] if columns else [])]


def joined(storage: Storage, unit: Staged, columns: Columns, wanted: Collection[str] | None = None) -> pa.Table:
    """Return the scorers' columns (those in `wanted`) for each row of the unit's table; nulls if it was not scored."""
    fields = [field for field in added(columns) if wanted is None or field.name in wanted]
    names = {field.name for field in fields}
    files = dict(unit.scores)
    values, errors = dict[str, Any](), list[pa.ChunkedArray]()
    for scorer, own in columns.items():
        requested = [field.name for field in own if field.name in names] + ["error"] * (ERROR.name in names)
        if not requested:
            continue
        if scorer not in files:
            errors += [pa.chunked_array([pa.repeat(f"{scorer}: not scored", unit.rows)])] * (ERROR.name in names)
            continue
        table = _read(storage, unit, files[scorer], requested)
        values |= {name: table[name] for name in requested if name != "error"}
        if ERROR.name in names:
            why = table["error"]
            errors.append(pc.if_else(pc.equal(why, ""), "", pc.binary_join_element_wise(scorer, why, ": ")))
    if ERROR.name in names:
        values[ERROR.name] = _join(errors, unit.rows)
    arrays = [values.get(field.name, pa.nulls(unit.rows, field.type)) for field in fields]
    return pa.table(arrays, schema=pa.schema(fields)) if fields else pa.table({})


def _join(errors: list[pa.ChunkedArray], rows: int) -> pa.ChunkedArray:
    """Join the reasons of several scorers to one text per row."""
    if not errors:
        return pa.chunked_array([pa.repeat("", rows)])
    all_ = errors[0]
    for more in errors[1:]:
        both = pc.and_(pc.not_equal(all_, ""), pc.not_equal(more, ""))
        all_ = pc.binary_join_element_wise(all_, more, pc.if_else(both, "; ", ""))
    return all_


def _read(storage: Storage, unit: Staged, file: str, columns: list[str]) -> pa.Table:
    """Read the columns that the file has."""
    table = storage.read_table(file, columns)
    if table.num_columns and len(table) != unit.rows:
        raise CapstanError(f"{storage.url}/{file} has {len(table)} rows, {unit.table} has {unit.rows}: remove {file}")
    return table


def embeddings(
    storage: Storage, units: Sequence[Staged], folder: Path | None = None, *, scorer: str = EMBEDDINGS
) -> npt.NDArray[np.float16]:
    """Return the vectors that `scorer` kept [rows, dim], in the order of units and tables; zeros where there is none.

    If `folder` is given, the array is a memory-mapped file there, so that it need not fit in memory. Raises RecipeError
    if none were kept.
    """
    check_vectors(units, scorer)
    rows = sum(unit.rows for unit in units)
    blocks = ahead(lambda unit: vectors_of(storage, unit, scorer), units)
    made: npt.NDArray[np.float16] | None = None
    start = 0
    for unit, block in zip(units, blocks, strict=True):
        if block is not None:
            if made is None:  # zeros, without touching memory
                made = _zeros((rows, block.shape[1]), folder, scorer)
            made[start : start + unit.rows] = block
        start += unit.rows
    assert made is not None
    return made


def vectors_of(storage: Storage, unit: Staged, scorer: str) -> npt.NDArray[np.float16] | None:
    """Return the vectors that `scorer` kept of a unit [rows, dim], zeros where there is none; None without a file."""
    return _block(storage, unit, dict(unit.scores).get(scorer), _VECTORS[scorer][0])


def check_vectors(units: Sequence[Staged], scorer: str) -> None:
    """Raise RecipeError if no vectors of `scorer` were kept."""
    _, field, hint = _VECTORS[scorer]
    if all(dict(unit.scores).get(scorer) is None for unit in units):
        raise RecipeError(field, f"no {scorer} are kept", hint)


def _zeros(shape: tuple[int, int], folder: Path | None, name: str) -> npt.NDArray[np.float16]:
    if folder is None:
        return np.zeros(shape, np.float16)
    return np.memmap(folder / f"{name}.f16", np.float16, "w+", shape=shape)


def _block(storage: Storage, unit: Staged, file: str | None, name: str) -> npt.NDArray[np.float16] | None:
    if file is None:
        return None
    column = _read(storage, unit, file, [name])[name].combine_chunks()
    dim = column.type.list_size
    there = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.values.slice(column.offset * dim, len(column) * dim).to_numpy(zero_copy_only=False)
    return np.where(there[:, None], values.reshape(len(column), dim), np.float16(0))


def pins(scorers: Sequence[Scorer]) -> list[dict[str, Any]]:
    """Describe the scorers whose columns the manifest and the ledger hold."""
    return [
        {
            "id": scorer.id,
            "columns": {field.name: str(field.type) for field in scorer.columns},
            **{name: value for name, value in scorer.identity.items() if name != "settings"},
            "settings": scorer.settings(),
        }
        for scorer in scorers
        if scorer.in_ledger
    ]


def pinned_columns(scores: Sequence[Mapping[str, Any]]) -> list[pa.Field]:
    """Return the table columns of the scorers that `pins` described."""
    return added(
        {
            pin["id"]: [pa.field(name, pa.type_for_alias(kind)) for name, kind in pin["columns"].items()]
            for pin in scores
        }
    )
