"""Files of latents and text states, read without a copy

    latents/<encoder id>/shard-000000.safetensors    tensors whose first axis is the shard's samples, in tar order

Each file names the version of its shard (`shard_sha256`) and has a checksum (pipeline.dataset.tensor_file). Damaged
files, and those of an earlier version of the shard, are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from capstan.pipeline.dataset import tensor_file
from capstan.pipeline.dataset.shards import Dataset, read_manifest
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.data.shard_cache import ShardCache

Raw = np.ndarray  # uint8 [bytes]: a whole safetensors file

_TYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "I32": np.int32, "I16": np.int16, "BOOL": np.bool_}


def file_pattern(encoder: str) -> str:
    """Return the name of a shard's file, with "{}" for the shard's name."""
    return f"latents/{encoder}/{{}}.safetensors"


def file_reader(storage: Storage, encoder: str, field: str, cache: ShardCache | None = None) -> Callable[[str], Raw]:
    """Return a function that reads a shard's file: mapped from a local folder or the cache, else into memory.

    It raises RecipeError naming `field` if the file is missing or belongs to an earlier version of the shard, and
    DamagedFile if it is not what was written.
    """
    manifest = read_manifest(storage)
    sums = {entry.name: entry.sha256 for entry in manifest.shards} if manifest else {}

    def read(shard: str) -> Raw:
        name = file_pattern(encoder).format(shard)
        if not storage.exists(name):
            raise RecipeError(field, f"{encoder} lacks {shard}", "run `capstan encode` to complete it")
        raw = _bytes_of(storage, name, sums.get(shard, ""), cache)
        tensor_file.check(raw, storage.path(name))
        if metadata_of(raw)["shard_sha256"] != sums.get(shard):
            problem = f"the latents of {shard} belong to an earlier version of that shard"
            raise RecipeError(field, problem, "run `capstan encode` to encode them again")
        return raw

    return read


def _bytes_of(storage: Storage, name: str, tag: str, cache: ShardCache | None) -> Raw:
    path = storage.local_path(name)
    if path is not None:
        return np.memmap(path, np.uint8, mode="r")
    copy = cache.fetch(name, tag) if cache is not None else None
    # The array keeps the copy mapped, and so in the cache.
    return np.frombuffer(storage.read(name) if copy is None else copy.data, np.uint8)


def refuse_not_finite(dataset: Dataset, shard: str, part: str, values: np.ndarray) -> None:
    """Raise CapstanError naming the first sample of a shard whose float16 values [samples, ...] are not all finite.

    `part` is what made them. Values above 65,504 became infinite when they were stored in half precision.
    """
    if values.dtype.kind != "f":
        return
    bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not bad.any():
        return
    first = int(np.flatnonzero(bad)[0])
    key = dataset.table(shard, ["key"])["key"][first].as_py()
    what = "NaN" if np.isnan(values[first]).any() else "beyond half precision (65,504)"
    count = f"{int(bad.sum())} of {len(values)} samples" if bad.sum() > 1 else "one sample"
    problem = f"{part} made values that are {what}: {count} of {shard}, the first is {key}"
    raise CapstanError(f"encode: {problem}. Fix: use a model whose weights are finite, in fp32 or bf16")


def parse(raw: Raw) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file by name, without a copy."""
    length, header = _header(raw)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = raw[start:stop].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def metadata_of(raw: Raw) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    return dict(_header(raw)[1]["__metadata__"])


def _header(raw: Raw) -> tuple[int, dict[str, Any]]:
    length = int.from_bytes(raw[:8].tobytes(), "little")
    return length, json.loads(raw[8 : 8 + length].tobytes())
