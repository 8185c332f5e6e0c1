"""Damaged state files: a build heals them, or names the file and says how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import run_all_here

from capstan.pipeline import build as stages
from capstan.pipeline.config import Blocklist, Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.publish.folder import Folder
from capstan.pipeline.publish.job import publish
from capstan.pipeline.report.query import Rows
from capstan.pipeline.source.plan import read_plan
from capstan.pipeline.storage import Storage
from capstan.recaption.store import rows_of_shard

ROWS = 8


@pytest.fixture
def build(tmp_path: Path, draw: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Builds a dataset of the first `count` of ROWS rows, two rows per unit."""
    for module in ("build", "pack.job"):
        monkeypatch.setattr(f"capstan.pipeline.{module}.run", run_all_here)

    def run(count: int = ROWS) -> dict[str, Any]:
        rows = [{"image": draw(n), "caption": str(n)} for n in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        settings = {
            "dataset": str(tmp_path / "ds"),
            "source": {"path": str(tmp_path / "rows.parquet"), "image": "image"},
            "image": {"size": 64, "min_size": 8},
            "dedup": {"perceptual": None, "exact": False},
            "unit": {"rows": 2},
        }
        return stages.build(Recipe.model_validate(settings), progress=False)

    return run


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "ds"))


@pytest.mark.parametrize("damage", [b"", b"{", b"\x00\xff", b"[]", b"null", b"{}"])
@pytest.mark.parametrize(
    "file", ["done/0000-000001.json", "plan/batch-0000/batch.json", "plan/source.json", "lease.json", "damaged/x.json"]
)
def test_these_are_made_again(build: Callable[..., Any], storage: Storage, file: str, damage: bytes) -> None:
    build(ROWS - 2)
    (name,) = [name for name in storage.names("state") if name.endswith(file)] or [f"state/{file}"]
    storage.write(name, damage)
    assert build(ROWS)["counts"]["kept"] == ROWS
    assert verify(storage) == []
    assert sum(unit.rows for unit in read_plan(storage).units) == ROWS
    assert len({row["key"] for row in Dataset(storage).ledger().to_pylist()}) == ROWS


def _cut(data: bytes) -> bytes:
    return data[:20]


def _flipped(data: bytes) -> bytes:
    return data[:21] + bytes([data[21] ^ 4]) + data[22:]


@pytest.mark.parametrize("heal", ["build", "repair"])
@pytest.mark.parametrize("harm", [_cut, _flipped, None], ids=["cut", "one bit", "gone"])
def test_damaged_keys_are_seen_and_written_again(
    build: Callable[..., Any], storage: Storage, harm: Callable[[bytes], bytes] | None, heal: str
) -> None:
    build(ROWS - 2)
    name = "state/plan/batch-0000/keys.bin"
    whole = storage.read(name)
    if harm is None:
        storage.delete(name)
    else:
        storage.write(name, harm(whole))
    assert verify(storage) == verify_lines(name)
    if heal == "repair":
        assert stages.repair(storage.url, progress=False)["repaired"] == verify_lines(name)
        assert verify(storage) == []
    build(ROWS)
    assert storage.read(name) == whole
    assert len(Dataset(storage).ledger()) == ROWS, "no row twice"


def verify_lines(name: str) -> list[str]:
    return [f"{name}: missing, or not what was written"]


def test_a_damaged_log_of_markers_is_named(build: Callable[..., Any], storage: Storage) -> None:
    build()
    job = next(name.split("/")[1] for name in storage.names("state") if name.startswith("state/ingest-"))
    storage.write(f"state/{job}/log.json", b"{")
    with pytest.raises(DamagedFile, match=rf"state/{job}/log.json is damaged .* Fix: remove this file"):
        build()
    storage.delete(f"state/{job}/log.json")
    assert build()["counts"]["kept"] == ROWS


def test_a_marker_without_its_facts_is_named(build: Callable[..., Any], storage: Storage) -> None:
    build()
    name = next(name for name in storage.names("state") if "/ingest-" in name and name.endswith("0000-000001.json"))
    storage.write(name, b"{}")
    assert [problem for problem in verify(storage) if "done/0000-000001.json is damaged (it has no 'table')" in problem]


@pytest.mark.parametrize("end", [".tar", ".parquet", ".tar.idx"])
def test_a_file_that_the_manifest_lists_and_that_is_missing_is_named(
    build: Callable[..., Any], storage: Storage, tmp_path: Path, end: str
) -> None:
    build()
    shard = Dataset(storage).shard_names[0]
    storage.delete(f"shards/{shard}{end}")
    missing = rf"{shard}{end} is damaged \(it is missing\)"
    with pytest.raises(DamagedFile, match=missing):
        publish(storage, Folder(Storage(str(tmp_path / "copy"))), str(tmp_path / "copy"), progress=False)
    if end != ".tar.idx":
        with pytest.raises(DamagedFile, match=missing):
            list(Dataset(storage).read_images(shard))
    if end == ".parquet":
        with pytest.raises(DamagedFile, match=missing):
            rows_of_shard(storage, "mine", shard)


def test_a_ledger_table_that_is_missing_is_named(build: Callable[..., Any], storage: Storage) -> None:
    build()
    name = next(name for name in storage.names("ledger"))
    storage.delete(name)
    with pytest.raises(DamagedFile, match=name), Rows(storage):
        pass


def test_what_was_removed_stays_removed(build: Callable[..., Any], storage: Storage, tmp_path: Path) -> None:
    build()
    gone = Dataset(storage).ledger().to_pylist()[0]["key"]
    (tmp_path / "keys.txt").write_text(gone)
    stages.remove(storage.url, Blocklist(keys=str(tmp_path / "keys.txt")), progress=False)
    storage.write("removed/blocklist.json", b"{")
    storage.write("removed/pending.parquet", b"PAR1 not whole PAR1")
    with pytest.raises(DamagedFile, match=r"removed/pending.parquet is damaged .* Fix: remove this file, and run"):
        build()
    storage.delete("removed/pending.parquet")
    assert build()["counts"]["kept"] == ROWS - 1
    lists = [name for name in storage.names("removed") if name.endswith(".parquet")]
    storage.delete(*lists)
    with pytest.raises(DamagedFile, match=r"blocklist.json is damaged .*no list is left"):
        build()
