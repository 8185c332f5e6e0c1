"""Small datasets of drawn squares for the training tests, and a tiny model family that trains in milliseconds."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import warm_python
from PIL import Image

from capstan.pipeline.dataset.shards import Manifest, Sample, ShardEntry, sha256_of, write_manifest, write_tar
from capstan.pipeline.records import SHARD_SCHEMA, make_key
from capstan.pipeline.storage import Storage

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}


@pytest.fixture(autouse=True)
def _one_thread():
    """Small models are fastest on one thread; what a run in this process has set must not stay."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _warm_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork a run's workers; how they are started is tested in test_launch.py."""
    monkeypatch.setattr("capstan.training.launch.subprocess", warm_python)


def jpeg(index: int, width: int = 16, height: int = 16) -> tuple[bytes, str]:
    """A square of one colour on grey, and a caption that says so."""
    name = list(COLOURS)[index % len(COLOURS)]
    pixels = np.full((height, width, 3), 90 + index % 40, dtype=np.uint8)
    pixels[height // 4 : -height // 4, width // 4 : -width // 4] = COLOURS[name]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue(), f"a {name} square, number {index}"


def write_dataset(
    folder: Path,
    counts: list[int],
    size: int = 16,
    sizes: list[tuple[int, int]] | None = None,
    captions: Callable[[int], str] | None = None,
    columns: Callable[[int], dict[str, Any]] | None = None,
) -> Path:
    """A finished dataset with shards of these many samples, of `sizes` (width, height) in turn.

    `captions` and `columns` give a sample's caption and its further columns.
    """
    storage, entries, index = Storage(str(folder)), [], 0
    (folder / "shards").mkdir(parents=True)
    for number, count in enumerate(counts):
        name, rows, samples = f"shard-{number:06d}", [], []
        for _ in range(count):
            width, height = sizes[index % len(sizes)] if sizes else (size, size)
            data, caption = jpeg(index, width, height)
            caption = captions(index) if captions else caption
            extra = json.dumps(columns(index)) if columns else f'{{"index":{index}}}'
            key = make_key(str(index))
            samples.append(Sample(key, data, {"key": key}, caption))
            rows.append(
                {"key": key, "caption": caption, "url": f"http://x.test/{index}.jpg", "width": width}
                | {
                    "height": height,
                    "original_width": width,
                    "original_height": height,
                    "bytes": len(data),
                    "sha256": sha256_of(data),
                }
                | {"crop_left": 0, "crop_top": 0, "phash": 0, "colours": "", "extra": extra}
            )
            index += 1
        spans = write_tar(folder / "shards" / f"{name}.tar", samples)
        rows = [
            row | {"offset": offset, "size": length, "json_size": 0}
            for row, (offset, length) in zip(rows, spans, strict=True)
        ]
        storage.write_table(f"shards/{name}.parquet", pa.Table.from_pylist(rows, schema=SHARD_SCHEMA))
        tar = (folder / "shards" / f"{name}.tar").read_bytes()
        table = storage.read(f"shards/{name}.parquet")
        entry = ShardEntry(
            name=name, samples=count, bytes=len(tar), sha256=sha256_of(tar), table_sha256=sha256_of(table)
        )
        entries.append(entry)
    write_manifest(storage, Manifest(shards=entries))
    return folder


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Path]:
    """`make_dataset(folder, [3, 5])` writes a dataset of two shards with three and five samples."""
    return write_dataset


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 samples in four shards."""
    return write_dataset(tmp_path_factory.mktemp("squares") / "ds", [20, 20, 20, 4])


@pytest.fixture(scope="session")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples in three shards: squares, and images half as wide or half as high again."""
    sizes = [(16, 16), (24, 16), (16, 24), (16, 16)]
    return write_dataset(tmp_path_factory.mktemp("shaped") / "ds", [20, 25, 15], sizes=sizes)
