"""Scores joined to staged tables, and embeddings as one array."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.score.store import added, embeddings, joined, pinned_columns
from capstan.pipeline.storage import Storage

COLUMNS = {"a": [pa.field("a_score", pa.float32())], "b": [pa.field("b_flag", pa.bool_())]}


def put(storage: Storage, name: str, **columns: pa.Array) -> str:
    storage.write_table(name, pa.table(columns))
    return name


def vectors(rows: list[list[float] | None]) -> pa.Array:
    return pa.array([r if r is None else np.array(r, np.float16) for r in rows], pa.list_(pa.float16(), 2))


def test_embeddings_come_in_order_with_zeros_where_there_are_none(storage: Storage, tmp_path: Path) -> None:
    first = put(storage, "scores/x/u0.parquet", embedding=vectors([[1, 2], None, [3, 4]]))
    last = put(storage, "scores/x/u2.parquet", embedding=vectors([[5, 6]]))
    units = [Staged("u0", "", "", 3, (("embeddings", first),)), Staged("u1", "", "", 2)]
    units.append(Staged("u2", "", "", 1, (("a", "unread"), ("embeddings", last))))
    expected = [[1, 2], [0, 0], [3, 4], [0, 0], [0, 0], [5, 6]]
    for folder in (None, tmp_path):
        found = embeddings(storage, units, folder)
        assert found.dtype == np.float16
        assert found.tolist() == expected
    assert isinstance(found, np.memmap)
    with pytest.raises(RecipeError, match=r"score.clip.embeddings: no embeddings are kept"):
        embeddings(storage, units[1:2])


def test_columns_are_joined_row_by_row_and_missing_ones_are_null(storage: Storage) -> None:
    a = put(storage, "scores/a/u.parquet", a_score=pa.array([0.5, None], pa.float32()), error=pa.array(["", "no JPEG"]))
    b = put(storage, "scores/b/u.parquet", b_flag=pa.array([True, None]), error=pa.array(["", "too long"]))
    unit = Staged("u", "", "", 2, (("a", a), ("b", b)))
    table = joined(storage, unit, COLUMNS)
    assert table.schema == pa.schema(added(COLUMNS))
    assert table.to_pydict() == {
        "a_score": [0.5, None],
        "b_flag": [True, None],
        "score_error": ["", "a: no JPEG; b: too long"],
    }
    assert joined(storage, unit, COLUMNS, {"b_flag"}).to_pydict() == {"b_flag": [True, None]}
    assert joined(storage, Staged("u", "", "", 2), COLUMNS).to_pydict() == {
        "a_score": [None, None],
        "b_flag": [None, None],
        "score_error": ["a: not scored; b: not scored"] * 2,
    }


def test_a_file_of_another_length_is_refused(storage: Storage) -> None:
    a = put(storage, "scores/a/u.parquet", a_score=pa.array([0.5], pa.float32()), error=pa.array([""]))
    with pytest.raises(CapstanError, match=r"scores/a/u.parquet has 1 rows"):
        joined(storage, Staged("u", "table", "", 2, (("a", a),)), COLUMNS)


def test_the_manifests_pins_restore_the_columns() -> None:
    pins = [{"id": name, "columns": {f.name: str(f.type) for f in fields}} for name, fields in COLUMNS.items()]
    assert pinned_columns(pins) == added(COLUMNS)
    assert pinned_columns([]) == []
