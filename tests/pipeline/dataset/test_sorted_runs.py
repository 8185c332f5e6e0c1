"""Sorted runs: the rows of some hashes, or of a range of them, and little else is read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from capstan.pipeline.dataset import sorted_runs
from capstan.pipeline.dataset.sorted_runs import HASH, ranges, rows_between, rows_with, write_run
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.storage import Storage


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Storage, pa.Table]:
    """A run of many row groups, in which some hashes occur twice."""
    monkeypatch.setattr(sorted_runs, "GROUP_ROWS", 64)
    hashes = np.random.default_rng(0).integers(0, 1 << 64, 1000, dtype=np.uint64)
    hashes[500:600] = hashes[:100]
    hashes[-2:] = (0, (1 << 64) - 1)
    table = pa.table([pa.array(hashes), pa.array(range(1000))], schema=pa.schema([HASH, pa.field("row", pa.int64())]))
    storage = Storage(str(tmp_path))
    write_run(storage, "run.parquet", table)
    return storage, table


@pytest.mark.parametrize("count", [1, 3, 32])
def test_ranges_hold_every_row_once_and_in_order(run: tuple[Storage, pa.Table], count: int) -> None:
    storage, table = run
    parts = [rows_between(storage, "run.parquet", low, high) for low, high in ranges(count)]
    found = pa.concat_tables(parts)
    order = np.argsort(table["hash"].to_numpy(), kind="stable")
    assert found["row"].to_pylist() == order.tolist()


def test_all_rows_of_the_wanted_hashes_are_found(run: tuple[Storage, pa.Table]) -> None:
    storage, table = run
    hashes = table["hash"].to_numpy()
    wanted = np.sort(np.append(hashes[[3, 70, 998, 999]], np.uint64(12345)))
    found = rows_with(storage, "run.parquet", wanted, ["row"])
    assert sorted(found["row"].to_pylist()) == [3, 70, 503, 570, 998, 999]
    assert len(rows_with(storage, "run.parquet", np.array([12345], np.uint64))) == 0


def test_a_run_may_be_empty(run: tuple[Storage, pa.Table]) -> None:
    storage, table = run
    write_run(storage, "empty.parquet", table.slice(0, 0))
    assert rows_between(storage, "empty.parquet", *ranges(1)[0]).schema == table.schema
    assert len(rows_with(storage, "empty.parquet", table["hash"].to_numpy()[:1])) == 0


def test_a_damaged_run_says_so(run: tuple[Storage, pa.Table]) -> None:
    storage, _ = run
    data = bytearray(storage.read("run.parquet"))
    data[40] ^= 1
    storage.write("run.parquet", bytes(data))
    with pytest.raises(DamagedFile):
        rows_between(storage, "run.parquet", *ranges(1)[0])
    storage.write("run.parquet", b"no table")
    with pytest.raises(DamagedFile):
        rows_with(storage, "run.parquet", np.array([1], np.uint64))
    with pytest.raises(FileNotFoundError):
        rows_with(storage, "none.parquet", np.array([1], np.uint64))
