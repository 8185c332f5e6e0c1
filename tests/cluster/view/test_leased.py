"""Tables that the browser changes: one lease at a time, given back after a pause or a failure."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
import pytest

from capstan.cluster.view.leased import Kept, LeasedTables
from capstan.pipeline.errors import CapstanError
from capstan.pipeline.lease import lease
from capstan.pipeline.storage import Storage


def kept(storage: Storage, name: str) -> Kept:
    def read() -> pa.Table:
        file = f"{name}.parquet"
        return storage.read_table(file) if storage.exists(file) else pa.table({"n": pa.array([], pa.int64())})

    return Kept(name, read, lambda table: storage.write_table(f"{name}.parquet", table))


def added(number: int, table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, pa.table({"n": [number]})])


def leases(storage: Storage) -> list[str]:
    return [name.rpartition("/")[2].removesuffix(".json") for name in storage.names("state/leases")]


def test_a_change_is_published_and_the_lease_of_one_table_is_held(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tables, one, other = LeasedTables(storage), kept(storage, "one"), kept(storage, "other")
    for number in (1, 2):
        before, after = tables.change(one, lambda table, number=number: added(number, table))
        assert (len(before), len(after)) == (number - 1, number)
    assert storage.read_table("one.parquet")["n"].to_pylist() == [1, 2]
    assert leases(storage) == ["one"]
    tables.change(other, lambda table: added(7, table))
    assert leases(storage) == ["other"]
    assert tables.read(one)["n"].to_pylist() == [1, 2]
    tables.close()
    assert leases(storage) == []


def test_the_lease_is_given_back_after_a_pause(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tables = LeasedTables(storage, idle_s=0.05)
    tables.change(kept(storage, "one"), lambda table: added(1, table))
    deadline = time.monotonic() + 60
    while leases(storage):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with lease(storage, "build"):
        pass


def test_a_change_that_fails_publishes_nothing_and_holds_nothing(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tables, one = LeasedTables(storage), kept(storage, "one")
    with pytest.raises(ZeroDivisionError):
        tables.change(one, lambda table: added(1 // 0, table))
    assert not storage.exists("one.parquet")
    assert leases(storage) == []
    with pytest.raises(ZeroDivisionError):
        tables.change(Kept("one", lambda: added(1 // 0, one.read()), one.write), lambda table: table)
    assert leases(storage) == []
    with lease(storage, "build"), pytest.raises(CapstanError, match="capstan build"):
        tables.change(one, lambda table: added(1, table))
    tables.change(one, lambda table: added(1, table))
    tables.close()
