"""Embeddings in the cache: those of the score files, of one state of one dataset."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.similar import vectors
from capstan.pipeline.storage import Storage
from capstan.pipeline.units.markers import MarkerLog

UNITS, ROWS, DIM = 3, 4, 8


def key(unit: int, row: int) -> str:
    return f"{unit:016x}{row:016x}"


def score(storage: Storage, unit: int, staging: str) -> None:
    """A unit's marker and its embeddings; the first row has none."""
    table = f"staged/0000-{unit:06d}-{staging}.parquet"
    MarkerLog(storage, "ingest-x").mark(f"0000-{unit:06d}", {"table": table, "tar": "", "rows": ROWS})
    values = [None] + [[unit + row / 8] * DIM for row in range(1, ROWS)]
    columns = {"key": [key(unit, row) for row in range(ROWS)], "embedding": values, "error": [""] * ROWS}
    schema = pa.schema({"key": pa.string(), "embedding": pa.list_(pa.float16(), DIM), "error": pa.string()})
    made = pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
    storage.write_table(f"scores/clip/0000-{unit:06d}-{staging}.parquet", made)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "ds"))
    storage.write("scores/clip/recipe.json", b'{"name": "embeddings", "model": {"weights": "abc"}}')
    storage.write("scores/other/recipe.json", b'{"name": "clip"}')
    for unit in range(UNITS):
        score(storage, unit, "0")
    return storage


def test_pairs_have_the_cosine_of_what_was_kept(storage: Storage, tmp_path: Path) -> None:
    pairs = [(key(0, 1), key(2, 3)), (key(0, 0), key(1, 1)), (key(1, 2), "f" * 32), (key(1, 1), key(0, 0))]
    units = {one: f"0000-{int(one[:16], 16):06d}" for pair in pairs for one in pair if one != "f" * 32}
    assert vectors.cosines(storage, pairs, units) == {pairs[0]: pytest.approx(1, abs=1e-3)}
    assert vectors.cosines(storage, pairs, {key(0, 1): "0000-000000"}) == {}
    assert vectors.cosines(Storage(str(tmp_path / "none")), pairs, units) == {}


def test_rows_keys_and_units_are_those_of_the_files(storage: Storage, tmp_path: Path) -> None:
    source = vectors.find(storage)
    assert source.model == {"weights": "abc"}
    shares: list[float] = []
    held = vectors.load(storage, source, tmp_path / "cache", shares.append)
    assert shares[-1] == 1
    assert held.rows.shape == (UNITS * ROWS, DIM)
    expected = [0 if row == 0 else unit + row / 8 for unit in range(UNITS) for row in range(ROWS)]
    assert held.rows[:, 0].tolist() == expected
    assert [held.key(row) for row in range(ROWS, 2 * ROWS)] == [key(1, row) for row in range(ROWS)]
    assert held.unit(2 * ROWS) == "0000-000002"
    assert held.row(key(2, 1), "0000-000002") == 2 * ROWS + 1
    assert held.row(key(2, 1), "0000-000001") is None
    assert held.row(key(2, 1), "elsewhere") is None
    storage.delete("scores/clip/0000-000001-0.parquet")
    again = vectors.load(storage, source, tmp_path / "cache", pytest.fail)  # from the cache
    assert again.rows.shape == held.rows.shape


def test_a_later_state_takes_the_place_of_an_earlier_one(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    vectors.load(storage, vectors.find(storage), folder)
    before = set(folder.iterdir())
    score(storage, 1, "1")  # as a takedown leaves it
    vectors.load(storage, vectors.find(storage), folder)
    assert len(set(folder.iterdir())) == len(before)
    assert not before & set(folder.iterdir())


def test_few_are_kept(storage: Storage, tmp_path: Path) -> None:
    for name in "abc":
        for file in storage.names(""):
            Storage(str(tmp_path / name)).write(file, storage.read(file))
        copy = Storage(str(tmp_path / name))
        vectors.load(copy, vectors.find(copy), tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.f16"))) == vectors.KEPT


def test_without_embeddings_the_recipe_says_what_to_set(storage: Storage) -> None:
    storage.write("scores/clip/recipe.json", b'{"name": "clip"}')
    with pytest.raises(RecipeError, match=r"score.clip.embeddings: no embeddings are kept"):
        vectors.find(storage)
