"""Rows in any order → rows by key, each key once: the same whether they fit into memory or not."""

import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from capstan.pipeline.source.columns import Row, of_rows
from capstan.pipeline.source.planning import external_sort
from capstan.pipeline.source.planning.external_sort import KEY_BYTES, ExternalKeySort, Known, hex_keys, raw_keys

ROWS = [Row(f"http://example.org/{number % 900}", extra=f'{{"n":{number}}}') for number in range(1500)]


def nothing(keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
    return np.zeros(len(keys), bool)


def sort(folder: Path, rows: list[Row], known: Known = nothing) -> tuple[list[pa.Table], ExternalKeySort]:
    folder.mkdir()
    sorter = ExternalKeySort(folder)
    for start in range(7):
        sorter.add(of_rows(rows[start::7]))
    return list(sorter.sorted(known)), sorter


def shuffled(seed: int) -> list[Row]:
    rows = ROWS[:]
    random.Random(seed).shuffle(rows)
    return rows


def test_keys_are_sorted_and_unique(tmp_path: Path) -> None:
    tables, sorter = sort(tmp_path / "a", shuffled(0))
    keys = pa.concat_tables(tables)["key"].to_pylist()
    assert keys == sorted({row.key for row in ROWS})
    assert (sorter.rows, sorter.repeats) == (1500, 600)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_sort, "RUN_BYTES", 20_000)
    monkeypatch.setattr(external_sort, "GROUP_BYTES", 9_000)


@pytest.mark.usefixtures("little_memory")
def test_many_runs_are_sorted_as_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, sorter = sort(tmp_path / "a", shuffled(0))
    assert len(list((tmp_path / "a").iterdir())) > 3
    assert len(tables) > 5
    monkeypatch.undo()
    (whole,), in_memory = sort(tmp_path / "b", shuffled(1))
    assert not list((tmp_path / "b").iterdir())
    assert pa.concat_tables(tables).to_pylist() == whole.to_pylist()
    assert sorter.repeats == in_memory.repeats == 600


@pytest.mark.usefixtures("little_memory")
def test_known_keys_are_dropped(tmp_path: Path) -> None:
    known = np.array([bytes.fromhex(row.key) for row in ROWS[:450]], f"S{KEY_BYTES}")
    tables, _ = sort(tmp_path / "a", shuffled(0), lambda keys: np.isin(keys, known))
    assert set(pa.concat_tables(tables)["key"].to_pylist()) == {row.key for row in ROWS} - {r.key for r in ROWS[:450]}


def test_raw_and_hexadecimal_keys_are_inverse() -> None:
    keys = pa.chunked_array([[row.key for row in ROWS[:5]], [row.key for row in ROWS[5:9]]])
    raw = raw_keys(keys)
    assert raw.to_pylist() == [bytes.fromhex(key) for key in keys.to_pylist()]
    assert hex_keys(pa.chunked_array([raw])).to_pylist() == keys.to_pylist()
    assert raw_keys(keys[:0]).to_pylist() == []
