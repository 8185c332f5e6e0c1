"""Small datasets of drawn images, written without Ray."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from capstan.pipeline.dataset.shards import Manifest, Sample, ShardEntry, read_manifest, write_manifest, write_tar
from capstan.pipeline.records import SHARD_SCHEMA, make_key
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch

Shards = list[list[int]]


def image(number: int) -> bytes:
    """A JPEG unlike those of other numbers."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((20, 16), Image.Resampling.NEAREST).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_dataset(storage: Storage, shards: Shards) -> None:
    """A dataset of these images, in place of what is there. An image whose number is negative is no image."""
    with scratch() as folder:
        entries = [_write(storage, folder, f"shard-{n:06d}", numbers) for n, numbers in enumerate(shards)]
    write_manifest(storage, Manifest(shards=entries))


def _write(storage: Storage, scratch: Path, name: str, numbers: list[int]) -> ShardEntry:
    jpegs = [image(number) if number >= 0 else b"no image" for number in numbers]
    keys = [make_key(str(number)) for number in numbers]
    tar = scratch / f"{name}.tar"
    digest = hashlib.sha256()
    spans = write_tar(
        tar, [Sample(k, j, {"url": ""}, f"alt {n}") for k, j, n in zip(keys, jpegs, numbers, strict=True)], digest
    )
    size = tar.stat().st_size
    storage.put(tar, f"shards/{name}.tar")
    rows: list[dict[str, Any]] = [
        {
            **dict.fromkeys(SHARD_SCHEMA.names, 0),
            "key": key,
            "caption": f"alt {number}",
            "url": "",
            "sha256": hashlib.sha256(jpeg).hexdigest(),
            "colours": "",
            "extra": "{}",
            "offset": offset,
            "size": length,
            "crc32": zlib.crc32(jpeg),
        }
        for number, key, jpeg, (offset, length) in zip(numbers, keys, jpegs, spans, strict=True)
    ]
    storage.write_table(f"shards/{name}.parquet", pa.Table.from_pylist(rows, SHARD_SCHEMA))
    return ShardEntry(name=name, samples=len(rows), bytes=size, sha256=digest.hexdigest(), table_sha256="")


def replace_image(storage: Storage, shard: str, key: str) -> None:
    """As if the sample's address served another image when the dataset was built again: its key stays."""
    name = f"shards/{shard}.parquet"
    table = storage.read_table(name)
    rows = [row | ({"sha256": "0" * 64} if row["key"] == key else {}) for row in table.to_pylist()]
    storage.write_table(name, pa.Table.from_pylist(rows, table.schema))
    manifest = read_manifest(storage)
    assert manifest is not None
    shards = [
        entry.model_copy(update={"sha256": "f" * 64}) if entry.name == shard else entry for entry in manifest.shards
    ]
    write_manifest(storage, manifest.model_copy(update={"shards": shards}))


def as_if_a_model_wrote_it(storage: Storage, layer: str) -> None:
    """Change what a layer of given captions says that it was made by."""
    name = f"captions/{layer}/recipe.json"
    storage.write(name, json.dumps(json.loads(storage.read(name)) | {"engine": {"engine": "coca"}}).encode())
