"""Energon's index by itself: the same bytes every time, nothing in memory, nothing where there is no shard."""

import hashlib
import json
import sqlite3
import struct
from pathlib import Path

import pyarrow as pa
import pytest

from capstan.pipeline.dataset import energon
from capstan.pipeline.dataset.indexes import hide_indexes, indexes, write_indexes
from capstan.pipeline.dataset.shards import Manifest, Sample, ShardEntry, write_samples
from capstan.pipeline.records import SHARD_SCHEMA, make_key
from capstan.pipeline.storage import Storage


@pytest.fixture
def manifest(storage: Storage, tmp_path: Path) -> Manifest:
    """Three shards; sizes at and around whole blocks."""
    entries = []
    for number, sizes in enumerate([[1, 511, 512], [513], [1024, 1025, 7, 3000]]):
        samples = [
            Sample(make_key(f"{number}.{size}"), b"\xff" * size, {"a": "b" * size}, "ü" * (size // 2)) for size in sizes
        ]
        places = write_samples(tmp_path / "shard.tar", samples)
        empty = {field.name: "" if field.type == pa.string() else 0 for field in SHARD_SCHEMA}
        rows = [
            empty | {"key": sample.key, "caption": sample.caption, **place._asdict()}
            for sample, place in zip(samples, places, strict=True)
        ]
        entry = ShardEntry(name=f"shard-{number:06}", samples=len(rows), bytes=9, sha256=f"{number}", table_sha256="")
        storage.put(tmp_path / "shard.tar", entry.tar)
        storage.write_table(entry.table, pa.Table.from_pylist(rows, SHARD_SCHEMA))
        entries.append(entry)
    return Manifest(shards=entries, recipe={"shards": {"random_access": True}})


def test_every_part_is_where_the_index_says(storage: Storage, manifest: Manifest, tmp_path: Path) -> None:
    energon.write_sqlite(tmp_path / "i.sqlite", storage, manifest.shards)
    with sqlite3.connect(tmp_path / "i.sqlite") as db:
        parts = db.execute(
            "SELECT tar_file_id, sample_key, part_name, content_byte_offset, content_byte_size, byte_offset, byte_size"
            " FROM samples JOIN sample_parts USING (tar_file_id, sample_index)"
        ).fetchall()
    assert len(parts) == 3 * 8
    for shard, key, name, offset, size, start, length in parts:
        tar = storage.read(manifest.shards[shard].tar)
        header = tar[offset - 512 : offset]
        assert header[:100].rstrip(b"\0").decode() == f"{key}.{name}"
        assert int(header[124:135], 8) == size
        assert start < offset <= offset + size <= start + length
    assert energon.sqlite_agrees(tmp_path / "i.sqlite", storage, manifest.shards)
    assert not energon.sqlite_agrees(tmp_path / "i.sqlite", storage, manifest.shards[:2])
    assert not energon.sqlite_agrees(tmp_path / "i.sqlite", storage, manifest.shards[::-1])


def test_the_tar_index_has_each_start_and_the_end(storage: Storage, manifest: Manifest) -> None:
    entry = manifest.shards[2]
    offsets = struct.unpack("<5Q", energon.tar_index(storage.read_table(entry.table)))
    tar = storage.read(entry.tar)
    assert offsets[0] == 0
    assert all(tar[offset : offset + 100].rstrip(b"\0").endswith(b".jpg") for offset in offsets[:4])
    assert not any(tar[offsets[4] :])


def test_the_same_shards_give_the_same_bytes(storage: Storage, manifest: Manifest, tmp_path: Path) -> None:
    sums = write_indexes(storage, manifest)
    first = {name: storage.read(name) for name in sums}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in first.items()} == sums
    hide_indexes(storage)
    assert not any(storage.exists(name) for name in sums)
    assert write_indexes(storage, manifest) == sums
    assert {name: storage.read(name) for name in sums} == first
    assert set(sums) >= set(energon.NAMES)
    assert first[energon.INDEX][96:100] == (3_040_001).to_bytes(4, "big")  # not the version of this machine's SQLite


def test_the_index_by_key_is_written_on_request(storage: Storage, manifest: Manifest) -> None:
    sums = write_indexes(storage, manifest.model_copy(update={"recipe": {"shards": {"random_access": False}}}))
    assert set(energon.NAMES) - sums.keys() == {energon.INDEX}
    assert not storage.exists(energon.INDEX)


def test_the_identity_follows_the_content(manifest: Manifest) -> None:
    name = ".nv-meta/index.uuid"
    other = [manifest.shards[0].model_copy(update={"sha256": "other"}), *manifest.shards[1:]]
    assert indexes(manifest)[name] == indexes(manifest.model_copy(update={"counts": {"kept": 3}}))[name]
    assert indexes(manifest)[name] != indexes(manifest.model_copy(update={"shards": other}))[name]


def test_an_empty_dataset_has_no_energon_index(storage: Storage) -> None:
    sums = write_indexes(storage, Manifest())
    assert sorted(sums) == ["shards/sizes.json", "sizes.json", "wids.json"]
    assert json.loads(storage.read("sizes.json")) == {}
