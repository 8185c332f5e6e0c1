"""Copies of packed shards: complete or not there, with the rows that may be used, and gone at the end."""

from __future__ import annotations

import pytest
from small_dataset import image, write_dataset

from capstan.pipeline.dataset.shards import Manifest, read_manifest
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.ingest.staging import images
from capstan.pipeline.pack.carryover import carried_over, clear, packed_shards, shelve
from capstan.pipeline.storage import Storage


@pytest.fixture
def manifest(storage: Storage) -> Manifest:
    write_dataset(storage, [[0, 1, 2], [3, 4]])
    found = read_manifest(storage)
    assert found is not None
    return found


def test_a_copy_counts_once_its_table_is_there(storage: Storage, manifest: Manifest) -> None:
    entry = manifest.shards[0]
    rows = storage.read_table(entry.table).to_pylist()
    storage.write("shelf/0000000000000000.tar", b"cut off before its table was written")
    assert carried_over(storage) == []
    shelve(storage, entry, storage.read(entry.tar), rows)
    stem = f"shelf/{entry.sha256[:16]}"
    assert carried_over(storage) == [(f"{stem}.tar", f"{stem}.parquet")]
    clear(storage)
    assert storage.names("shelf") == []


def test_only_rows_of_the_copys_table_are_found_in_it(storage: Storage, manifest: Manifest) -> None:
    entry = manifest.shards[0]
    rows = storage.read_table(entry.table).to_pylist()
    shelve(storage, entry, storage.read(entry.tar), [rows[0], rows[2]])
    found = dict(images(storage, entry.table, "", range(3), carried_over(storage)))
    assert [found[0], found[1], found[2]] == [image(0), None, image(2)]


def test_a_unit_that_was_never_packed_is_in_no_shard(storage: Storage, manifest: Manifest) -> None:
    unit = Staged("0000-000000", "staged/x.parquet", "", 3)
    assert packed_shards(storage, None, unit) == packed_shards(storage, manifest, unit) == []
