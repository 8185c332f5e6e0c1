"""A packed dataset in other people's readers: every sample once, the same pixels, the same caption."""

import io
import json
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capstan.pipeline.config import Resources
from capstan.pipeline.dataset import energon
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration

Samples = Mapping[str, tuple[np.ndarray, str]]  # key → pixels (height, width, 3), caption


@pytest.fixture(scope="module")
def expected(odd_dataset: Path) -> Samples:
    dataset = Dataset(Storage(str(odd_dataset)))
    captions = {row["key"]: row["caption"] for name in dataset.shard_names for row in dataset.table(name).to_pylist()}
    images = (pair for name in dataset.shard_names for pair in dataset.read_images(name))
    return {key: (np.asarray(Image.open(io.BytesIO(jpeg))), captions[key]) for key, jpeg in images}


def tars(dataset: Path) -> list[str]:
    return [str(path) for path in sorted(dataset.glob("shards/*.tar"))]


def same(read: Iterable[tuple[str, Any, str]], expected: Samples) -> None:
    """`read` is (key, pixels, caption) of each sample."""
    seen: list[str] = []
    for key, pixels, caption in read:
        np.testing.assert_array_equal(np.asarray(pixels), expected[key][0], err_msg=key)
        assert caption == expected[key][1], key
        seen.append(key)
    assert sorted(seen) == sorted(expected)


def test_webdataset(odd_dataset: Path, expected: Samples) -> None:
    import webdataset

    read = list(webdataset.WebDataset(tars(odd_dataset), shardshuffle=False).decode("pil"))
    same(((sample["__key__"], sample["jpg"], sample["txt"]) for sample in read), expected)
    extras = [json.loads(sample["json"]["extra"]) for sample in read]
    assert sorted(extra["number"] for extra in extras) == list(range(23))
    assert {json.dumps(extra["sometimes"]) for extra in extras} >= {"null", "0.0", "11.0"}


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face(odd_dataset: Path, expected: Samples, streaming: bool, tmp_path: Path) -> None:
    import datasets

    read = datasets.load_dataset(
        "webdataset", data_files=tars(odd_dataset), split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    rows = list(read)
    same(((row["__key__"], row["jpg"], row["txt"]) for row in rows), expected)
    for row in rows:
        assert row["json"]["key"] == row["__key__"]
        assert row["json"]["caption"] == row["txt"]
        assert (row["json"]["width"], row["json"]["height"]) == row["jpg"].size
        assert json.loads(row["json"]["extra"])["key"] == "mine"


def test_ray_data(odd_dataset: Path, expected: Samples, ray_session: Resources) -> None:
    import ray.data

    rows = ray.data.read_webdataset(tars(odd_dataset)).take_all()
    same(((row["__key__"], row["jpg"], row["txt"]) for row in rows), expected)


def test_open_clip_finds_the_sizes(odd_dataset: Path, expected: Samples) -> None:
    from open_clip_train.data import get_dataset_size

    braces = f"{odd_dataset}/shards/shard-{{000000..000002}}.tar"
    assert get_dataset_size(braces) == (len(expected), 3)
    assert get_dataset_size(f"{odd_dataset}/shards/shard-000000.tar") == (8, 1)
    assert (odd_dataset / "sizes.json").read_bytes() == (odd_dataset / "shards/sizes.json").read_bytes()


def test_wids_lists_the_shards(odd_dataset: Path) -> None:
    index = json.loads((odd_dataset / "wids.json").read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    for shard, tar in zip(index["shardlist"], tars(odd_dataset), strict=True):
        assert odd_dataset / shard["url"] == Path(tar)  # wids takes addresses from where wids.json lies
        assert shard["filesize"] == Path(tar).stat().st_size
    assert [shard["nsamples"] for shard in index["shardlist"]] == [8, 8, 7]


@pytest.mark.parametrize("by_key", [False, True])
def test_energon(odd_dataset: Path, expected: Samples, tmp_path: Path, by_key: bool) -> None:
    from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset

    folder = odd_dataset
    if not by_key:
        folder = tmp_path / "without"
        shutil.copytree(odd_dataset, folder, ignore=shutil.ignore_patterns("staged", "state", "index.sqlite"))
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_train_dataset(
        folder, worker_config=workers, batch_size=None, shuffle_buffer_size=None, max_samples_per_sequence=None,
        repeat=False,
    )  # fmt: skip
    samples = list(get_savable_loader(dataset))
    assert type(samples[0]).__name__ == "CaptioningSample"
    pixels = [(sample.image.permute(1, 2, 0) * 255).round().byte().numpy() for sample in samples]
    same(zip((s.__key__ for s in samples), pixels, (s.caption for s in samples), strict=True), expected)


def test_energon_finds_a_sample_by_its_key(odd_dataset: Path, expected: Samples) -> None:
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.itar_reader import SqliteITarEntryReader

    reader = SqliteITarEntryReader(EPath(odd_dataset), key_is_full_entryname=True)
    for key, (pixels, caption) in expected.items():
        jpeg, _ = reader[f"{key}.jpg"]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(jpeg))), pixels)
        text, _ = reader[f"{key}.txt"]
        assert text.decode() == caption
        fields, _ = reader[f"{key}.json"]
        assert json.loads(fields)["key"] == key
    assert len(reader) == len(expected)


def test_what_is_written_is_what_energon_prepare_would_write(odd_dataset: Path, tmp_path: Path) -> None:
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    other = tmp_path / "other"
    for tar in tars(odd_dataset):
        (other / "shards").mkdir(parents=True, exist_ok=True)
        shutil.copy(tar, other / "shards")
    names = [f"shards/{Path(tar).name}" for tar in tars(odd_dataset)]
    WebdatasetPreparator.prepare_dataset(other, names, split_parts_ratio=[("train", 1.0)], workers=1, shuffle_seed=None)

    for name in names:
        assert (odd_dataset / f"{name}.idx").read_bytes() == (other / f"{name}.idx").read_bytes()
    assert content(odd_dataset / energon.INDEX) == content(other / energon.INDEX)
    counts = [json.loads((folder / energon.INFO).read_text())["shard_counts"] for folder in (odd_dataset, other)]
    assert counts[0] == counts[1]


def content(path: Path) -> dict[str, list[Any]]:
    """Every row of every table, and every column of every index."""
    with sqlite3.connect(path) as db:
        tables = {name: db.execute(f"SELECT * FROM {name} ORDER BY 1, 2, 3, 4").fetchall() for name in
                  ("samples", "sample_parts")}  # fmt: skip
        indexes = {name: db.execute(f"PRAGMA index_info({name})").fetchall() for (name,) in
                   db.execute("SELECT name FROM sqlite_master WHERE type = 'index' ORDER BY 1").fetchall()}  # fmt: skip
    return tables | indexes
