"""What was made of a dataset's pictures, without the rows that were removed: caption layers and latents.

    captions/**.parquet                              tables with a column `key`
    latents/<encoder id>/shard-000000.safetensors    tensors whose first axis is the shard's samples

Latents go by the place of a sample in its shard and by the shard's sum, which is known only once the shard is packed
anew: until then they say which keys they are for (`keys`), and are of no shard (readers refuse them).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commits import mark
from pipeline.config import Recipe, fingerprint
from pipeline.ingest import Ingest
from pipeline.shards import Manifest
from pipeline.storage import Storage

log = logging.getLogger(__name__)

_SUM, _KEYS = "shard_sha256", "keys"
_LATENTS: Final = "latents"


def scrub_derived(storage: Storage, keys: pa.Array, shards: Iterable[str]) -> None:
    """Drop the rows of `keys`, of which these `shards` (as they are packed now) hold some. May be repeated."""
    for name in storage.names("captions"):
        if name.endswith(".parquet"):
            _scrub_table(storage, name, keys)
    for shard in shards:
        files = [name for name in storage.names(_LATENTS) if name.endswith(f"/{shard}.safetensors")]
        for name in files:
            _scrub_latents(storage, name, shard, keys)


def _scrub_table(storage: Storage, name: str, keys: pa.Array) -> None:
    here = pc.is_in(storage.read_table(name, ["key"])["key"], keys)
    if pc.any(here).as_py():
        storage.write_table(name, storage.read_table(name).filter(pc.invert(here)))


def _scrub_latents(storage: Storage, name: str, shard: str, keys: pa.Array) -> None:
    tensors, said = _read(storage.read(name))
    if _KEYS in said:
        return
    table = f"shards/{shard}.parquet"
    held = storage.read_table(table, ["key"])["key"].combine_chunks() if storage.exists(table) else pa.array([], "utf8")
    rows = {len(tensor) for tensor in tensors.values()}
    if rows != {len(held)}:
        log.warning("%s is not of the shard as it is: removed, to be encoded again", name)
        storage.delete(name)
        return
    left = np.asarray(pc.invert(pc.is_in(held, keys)))
    if left.all():
        return
    expected = fingerprint(held.filter(pa.array(left)).to_pylist())
    metadata = {**said, _SUM: "", _KEYS: expected}
    storage.write(name, _write({tensor: value[left] for tensor, value in tensors.items()}, metadata))


def settle_latents(storage: Storage, manifest: Manifest | None) -> None:
    """Name scrubbed latents after the shards as they are now; those of a shard that holds other samples are removed."""
    shards = {entry.name: entry for entry in (manifest.shards if manifest else [])}
    for name in storage.names(_LATENTS):
        _, encoder, file = name.split("/")
        if not file.endswith(".safetensors"):
            continue
        tensors, said = _read(storage.read(name))
        if _KEYS not in said:
            continue
        entry = shards.get(file.removesuffix(".safetensors"))
        keys = storage.read_table(entry.table, ["key"])["key"].to_pylist() if entry else []
        if entry is None or fingerprint(keys) != said.pop(_KEYS):
            storage.delete(name)
            continue
        data = _write(tensors, {**said, _SUM: entry.sha256})
        storage.write(name, data)
        job = Ingest(Recipe(dataset=storage.url), storage)
        job.name = f"latents-{encoder}"
        mark(job, f"{entry.name}-{entry.sha256[:12]}", {"samples": len(keys), "bytes": len(data)})


def _read(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """A safetensors file → its tensors, and what it says of itself."""
    from safetensors.numpy import load

    size = int.from_bytes(data[:8], "little")
    return load(data), dict(json.loads(data[8 : 8 + size]).get("__metadata__", {}))


def _write(tensors: Mapping[str, Any], metadata: dict[str, str]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata=metadata)
