"""Verification on workers: the same lines as in threads, whatever the number of workers; keys are compared by range."""

import random
import shutil
import sys
from pathlib import Path

import cloudpickle
import pyarrow as pa
import pytest

from capstan.pipeline import units
from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.shards import read_manifest, sha256_of, write_manifest
from capstan.pipeline.errors import CapstanError
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.pack.verify_job import Checked, Verify, overlapping
from capstan.pipeline.storage import Storage, parquet_bytes

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules


@pytest.fixture
def on_workers(monkeypatch: pytest.MonkeyPatch) -> Resources:
    monkeypatch.setattr(units, "SMALL_RUN", 0)
    return Resources(executor="processes", cpus=2)


@pytest.fixture
def damaged(odd_dataset: Path, tmp_path: Path) -> Storage:
    """A dataset with a problem of every kind that workers find."""
    shutil.copytree(odd_dataset, tmp_path / "ds")
    storage = Storage(str(tmp_path / "ds"))
    names = storage.names()
    tars = [name for name in names if name.startswith(("shards/", "staged/")) and name.endswith(".tar")]
    ledger = [name for name in names if name.startswith("ledger/")]
    for name in (*tars[:1], tars[-1], ledger[0], "state/plan/batch-0000/keys.bin"):
        data = bytearray(storage.read(name))
        data[len(data) // 2] ^= 1
        storage.write(name, bytes(data))
    storage.write("captions/mine/shard-000000.parquet", b"no table")
    return storage


@pytest.mark.integration
def test_workers_find_what_threads_find(
    damaged: Storage, on_workers: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, before = verify(damaged, resources=on_workers), damaged.names()
    monkeypatch.undo()
    assert found == verify(damaged)
    assert damaged.names() == before, "nothing is written in the dataset"
    folders = {line.split("/")[0] for line in found}
    assert {"shards", "ledger", "staged", "state", "captions"} <= folders


@pytest.mark.integration
def test_a_key_in_two_shards_is_named_once(
    odd_dataset: Path, tmp_path: Path, on_workers: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(odd_dataset, tmp_path / "ds")
    storage = Storage(str(tmp_path / "ds"))
    manifest = read_manifest(storage)
    assert manifest is not None
    first, second = manifest.shards[:2]
    table = storage.read_table(second.table)
    key = storage.read_table(first.table)["key"][1].as_py()
    keys = table["key"].to_pylist()
    keys[0] = key
    data = parquet_bytes(table.set_column(0, table.schema.field(0), pa.array(keys)))
    storage.write(second.table, data)
    changed = second.model_copy(update={"table_sha256": sha256_of(data)})
    shards = [first, changed, *manifest.shards[2:]]
    write_manifest(storage, manifest.model_copy(update={"shards": shards}))
    line = f"{second.table}: key {key} is also in {first.table}"
    assert [one for one in verify(storage, resources=on_workers) if "is also in" in one] == [line]
    monkeypatch.undo()
    assert [one for one in verify(storage) if "is also in" in one] == [line]


class Failing(Verify):
    """A worker that cannot read one file, whatever it tries."""

    def prepare(self, unit: units.Unit) -> object:  # type: ignore[override]
        if unit.spec["kind"] == "ledger":
            raise MemoryError("no memory left")
        return super().prepare(unit)


@pytest.mark.integration
def test_a_unit_that_keeps_failing_is_no_finding(
    odd_dataset: Path, on_workers: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capstan.pipeline.pack.verify_job.Verify", Failing)
    with pytest.raises(CapstanError, match="no memory left") as raised:
        verify(Storage(str(odd_dataset)), resources=on_workers)
    assert raised.value.exit_code == 1


def checked(*keys: int) -> Checked:
    names = [f"{key:032x}" for key in keys]
    return Checked(rows=len(keys), first=min(names), last=max(names), repeats=len(names) - len(set(names)))


def test_shards_that_follow_each_other_are_not_read_again() -> None:
    assert list(overlapping([checked(0, 5), checked(6, 9), Checked(), checked(10, 12)])) == []


def test_a_shard_that_repeats_a_key_is_read_alone() -> None:
    ((_, _, members),) = overlapping([checked(0, 5), checked(6, 6)])
    assert members == [1]


@pytest.mark.parametrize("most", [1, 3, 64])
def test_every_pair_of_shards_that_share_a_key_meets_in_the_range_of_that_key(most: int) -> None:
    random.seed(most)
    keys = [sorted(random.sample(range(1000), 8)) for _ in range(40)]
    ranges = list(overlapping([checked(*each) for each in keys], most))
    for one, mine in enumerate(keys):
        for other, theirs in enumerate(keys[:one]):
            for key in set(mine) & set(theirs):
                held = [set(members) for low, high, members in ranges if low <= f"{key:032x}" < high]
                assert len(held) == 1
                assert {one, other} <= held[0]
