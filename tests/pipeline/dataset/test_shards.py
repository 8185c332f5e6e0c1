"""Tar shards: always the same bytes, and readable by everyone."""

import hashlib
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from capstan.pipeline.dataset.shards import (
    Dataset,
    Manifest,
    Sample,
    ShardEntry,
    read_manifest,
    write_manifest,
    write_tar,
)
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage

SAMPLES = [
    Sample(f"{n:032x}", b"\xff\xd8" + bytes([n]) * (511 * n), {"key": f"{n:032x}", "score": n / 2}, f"caption {n} ü")
    for n in range(5)
]


def test_members_are_adjacent_in_order_and_plain(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", SAMPLES)
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:4]] == [
        *(f"{0:032x}.{suffix}" for suffix in ("jpg", "json", "txt")),
        f"{1:032x}.jpg",
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    assert (tmp_path / "a.tar").read_bytes().count(b"ustar") == 15  # no PAX headers between


def test_the_same_samples_give_the_same_bytes_and_the_digest_is_theirs(tmp_path: Path) -> None:
    digest = hashlib.sha256()
    write_tar(tmp_path / "a.tar", SAMPLES, digest)
    write_tar(tmp_path / "b.tar", iter(SAMPLES))
    data = (tmp_path / "a.tar").read_bytes()
    assert data == (tmp_path / "b.tar").read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest.hexdigest()


def test_spans_locate_the_images(tmp_path: Path) -> None:
    spans = write_tar(tmp_path / "a.tar", SAMPLES)
    data = (tmp_path / "a.tar").read_bytes()
    assert [data[offset : offset + size] for offset, size in spans] == [sample.jpg for sample in SAMPLES]


def test_webdataset_reads_it(tmp_path: Path) -> None:
    import webdataset

    write_tar(tmp_path / "a.tar", SAMPLES)
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [sample.key for sample in SAMPLES]
    assert read[3]["txt"].decode() == "caption 3 ü"
    assert json.loads(read[3]["json"])["score"] == 1.5


def test_staged_tars_hold_images_only(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [Sample("k", b"JPEG")])
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == ["k.jpg"]


def make_dataset(storage: Storage) -> None:
    path = Path(str(storage.local_path("shards/shard-000000.tar")))
    path.parent.mkdir(parents=True)
    spans = write_tar(path, SAMPLES)
    offset, size = zip(*spans, strict=True)
    table = pa.table({"key": [s.key for s in SAMPLES], "offset": offset, "size": size})
    storage.write_table("shards/shard-000000.parquet", table)
    entry = ShardEntry(name="shard-000000", samples=5, bytes=path.stat().st_size, sha256="", table_sha256="")
    write_manifest(storage, Manifest(shards=[entry], counts={"kept": 5}))


def test_a_dataset_gives_images_by_row(storage: Storage) -> None:
    make_dataset(storage)
    dataset = Dataset(storage)
    assert dataset.shard_names == ["shard-000000"]
    assert list(dataset.read_images("shard-000000")) == [(s.key, s.jpg) for s in SAMPLES]
    assert list(dataset.read_images("shard-000000", [3, 1])) == [(SAMPLES[n].key, SAMPLES[n].jpg) for n in (3, 1)]


def test_a_cut_tar_is_an_error_not_a_short_image(storage: Storage) -> None:
    make_dataset(storage)
    storage.write("shards/shard-000000.tar", storage.read("shards/shard-000000.tar")[:6000])
    with pytest.raises(CapstanError, match="ends within an image"):
        list(Dataset(storage).read_images("shard-000000"))


def test_where_there_is_no_dataset(storage: Storage) -> None:
    assert read_manifest(storage) is None
    with pytest.raises(RecipeError, match="dataset: no dataset at"):
        Dataset(storage)
    storage.write("dataset.json", b'{"shards": 5}')
    with pytest.raises(CapstanError, match="is not a manifest"):
        Dataset(storage)
    write_manifest(storage, Manifest(format_version=99))
    with pytest.raises(CapstanError, match=r"format 99, and this Capstan reads up to.*upgrade: pip install"):
        Dataset(storage)
