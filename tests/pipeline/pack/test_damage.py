"""Bytes that changed on the disk: nothing is packed, carried over or served that is not what was written."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import run_all_here

from capstan.pipeline import build as stages
from capstan.pipeline.config import Blocklist, Recipe
from capstan.pipeline.dataset.shards import Dataset, read_manifest, sha256_of, write_manifest
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage

Make = Callable[..., Recipe]
IMAGES = 12


@pytest.fixture
def make(tmp_path: Path, draw: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch) -> Make:
    """A recipe over IMAGES embedded images in two units, keeping those whose number is at least `least`."""
    for module in ("build", "pack.job"):
        monkeypatch.setattr(f"capstan.pipeline.{module}.run", run_all_here)
    rows = [{"image": draw(n), "caption": str(n)} for n in range(IMAGES)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")

    def recipe(least: int = 0, **sections: Any) -> Recipe:
        settings = {
            "dataset": str(tmp_path / "ds"),
            "source": {"path": str(tmp_path / "rows.parquet"), "image": "image"},
            "image": {"size": 64, "min_size": 8},
            "select": [{"name": "least", "where": f"caption::int >= {least}"}],
            "dedup": {"perceptual": None, "exact": False},
            "unit": {"rows": 6},
            "shards": {"samples": 4},
        }
        return Recipe.model_validate(settings | sections)

    return recipe


def build(recipe: Recipe) -> dict[str, Any]:
    return stages.build(recipe, progress=False)


def names(storage: Storage, folder: str, suffix: str) -> list[str]:
    return [name for name in storage.names(folder) if name.endswith(suffix)]


def table_of(storage: Storage, tar: str) -> str:
    """The table of a staged tar."""
    unit = tar.rpartition("-")[0]
    (table,) = [name for name in names(storage, "staged", ".parquet") if name.startswith(unit)]
    return table


def flip(storage: Storage, tar: str, table: str, number: int) -> str:
    """Flip a bit in the middle of an image of a tar; return its key."""
    place = [row for row in storage.read_table(table).to_pylist() if row["size"]][number]
    data = bytearray(storage.read(tar))
    data[place["offset"] + place["size"] // 2] ^= 1
    storage.write(tar, bytes(data))
    return str(place["key"])


def test_damaged_staged_images_are_not_packed(make: Make) -> None:
    build(make())
    storage = Storage(make().dataset)
    for tar in names(storage, "staged", ".tar"):
        flip(storage, tar, table_of(storage, tar), 1)
    summary = stages.select(make(least=1), progress=False)
    assert summary["quarantined"]
    assert all("staged/" in reason and "is damaged" in reason for reason in summary["quarantined"].values())
    assert not [problem for problem in verify(storage) if "dataset.json" not in problem and "ledger" not in problem]


@pytest.mark.parametrize("part", ["image", "table", "half"])
def test_damaged_shards_are_not_served(make: Make, part: str) -> None:
    build(make())
    storage = Storage(make().dataset)
    dataset = Dataset(storage)
    shard = dataset.shard_names[0]
    tar, table = f"shards/{shard}.tar", f"shards/{shard}.parquet"
    assert len(list(dataset.read_images(shard))) == 4
    if part == "image":
        flip(storage, tar, table, 2)
    elif part == "half":
        storage.write(tar, storage.read(tar)[: storage.size(tar) // 3])
    else:
        data = bytearray(storage.read(table))
        data[len(data) // 2] ^= 1
        storage.write(table, bytes(data))
    with pytest.raises(DamagedFile, match=shard):
        list(dataset.read_images(shard))


def test_a_damaged_ledger_is_not_served(make: Make) -> None:
    build(make())
    storage = Storage(make().dataset)
    (name, *_) = storage.names("ledger")
    data = bytearray(storage.read(name))
    data[len(data) // 2] ^= 1
    storage.write(name, bytes(data))
    with pytest.raises(DamagedFile, match=name):
        Dataset(storage).ledger()


def test_a_damaged_shard_is_not_carried_over(make: Make) -> None:
    build(make(keep_staged=False))
    storage = Storage(make().dataset)
    (shard,) = [row["shard"] for row in Dataset(storage).ledger().to_pylist() if row["caption"] == "0"]
    flip(storage, f"shards/{shard}.tar", f"shards/{shard}.parquet", 1)
    before = storage.read("dataset.json")
    with pytest.raises(DamagedFile, match=shard):
        stages.select(make(least=1, keep_staged=False), progress=False)
    assert storage.read("dataset.json") == before


def test_a_takedown_leaves_damaged_images_out(make: Make, tmp_path: Path) -> None:
    build(make())
    storage = Storage(make().dataset)
    tar = names(storage, "staged", ".tar")[0]
    unit = tar.removeprefix("staged/").rpartition("-")[0]
    damaged = flip(storage, tar, table_of(storage, tar), 1)
    kept = {row["key"]: row for row in Dataset(storage).ledger().to_pylist() if row["unit"] == unit}
    gone = next(key for key in kept if key != damaged)
    (tmp_path / "keys.txt").write_text(gone)
    summary = stages.remove(str(tmp_path / "ds"), Blocklist(keys=str(tmp_path / "keys.txt")), progress=False)
    assert summary["removed"]["rows"] == 1
    ledger = {row["key"]: row for row in Dataset(storage).ledger().to_pylist()}
    assert ledger[gone]["reason"] == "removed"
    assert ledger[damaged]["outcome"] == "kept"  # the old shard still holds it
    assert verify(storage) == []


def test_tables_of_older_versions_are_read_and_whole(make: Make) -> None:
    """Without checksums of images, as 0.1 wrote them."""
    build(make())
    storage = Storage(make().dataset)
    manifest = read_manifest(storage)
    assert manifest is not None
    shards = []
    for entry in manifest.shards:
        buffer = io.BytesIO()
        pq.write_table(storage.read_table(entry.table).drop_columns(["crc32"]), buffer, compression="zstd")
        storage.write(entry.table, buffer.getvalue())
        shards.append(entry.model_copy(update={"table_sha256": sha256_of(buffer.getvalue())}))
    write_manifest(storage, manifest.model_copy(update={"shards": shards}))
    assert verify(storage) == []
    assert sum(len(list(Dataset(storage).read_images(entry.name))) for entry in shards) == IMAGES
