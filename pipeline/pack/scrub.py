"""Removal of rows from the files derived from images: captions, latents, text states, reviews

    captions/**.parquet                              tables with a column `key`, also those of unfinished layers
    review/*.parquet                                 verdicts and notes of people
    pairs/verdicts.parquet                           verdicts of people on pairs of rows
    latents/<encoder id>/shard-000000.safetensors    tensors whose first axis is the shard's samples

Latents are stored by a sample's position in its shard and carry the shard's sum. That sum is known only once the shard
is repacked. Until then, scrubbed latents carry a hash of their keys (`keys`) instead, and readers refuse them.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import fingerprint
from capstan.pipeline.dataset import tensor_file
from capstan.pipeline.dataset.shards import Manifest
from capstan.pipeline.select.pairs import read_pairs, without, write_pairs
from capstan.pipeline.select.review import FOLDER
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog

log = logging.getLogger(__name__)

_SUM, _KEYS = "shard_sha256", "keys"
_LATENTS: Final = "latents"


def scrub_derived(
    storage: Storage, keys: pa.Array, shards: Collection[str], packed: Collection[tuple[str, str]]
) -> None:
    """Remove the rows of `keys`, some of which the present `shards` hold. May be repeated.

    `packed` are the present shards (name, sum). Latents of any other shard may hold any row, and are deleted. Files
    that a marker says to be of a present shard are not read, unless it is among `shards`: they hold its samples alone.
    """
    captions, latents = storage.names("captions"), storage.names(_LATENTS)
    others = {(name, sha256) for name, sha256 in packed if name not in shards}
    known = _captions_of(storage, captions, others) | _latents_of(storage, latents, others)
    for name in [*captions, *storage.names(FOLDER)]:
        if name.endswith(".parquet") and name not in known:
            _scrub_table(storage, name, keys)
    if len(judged := read_pairs(storage)) and len(left := without(judged, keys)) < len(judged):
        write_pairs(storage, left)
    for name in latents:
        path = PurePosixPath(name)
        if name in known or path.suffix != ".safetensors" or _KEYS in (metadata := _metadata(storage, name)):
            continue
        if (path.stem, metadata.get(_SUM, "")) not in packed:
            log.warning("%s does not belong to the present shard: deleted; encode it again", name)
            _drop_latents(storage, path)
        elif path.stem in shards:
            _scrub_latents(storage, name, path.stem, keys)


def _captions_of(storage: Storage, names: list[str], shards: Collection[tuple[str, str]]) -> set[str]:
    """Return the files among `names` that a caption job wrote for these shards as they are."""
    found = set[str]()
    for layer in {name.split("/")[1] for name in names if name.count("/") == 2}:
        marks = MarkerLog(storage, f"recaption-{layer}").read()
        found |= {
            f"captions/{layer}/{shard}.parquet" for shard, m in marks.items() if (shard, m.get("source")) in shards
        }
    return found


def _latents_of(storage: Storage, names: list[str], shards: Collection[tuple[str, str]]) -> set[str]:
    """Return the files among `names` that a job encoded for these shards as they are, and for no other before."""
    found, ids = set[str](), {f"{shard}-{sha256[:12]}": shard for shard, sha256 in shards}
    for encoder in {name.split("/")[1] for name in names if name.endswith(".safetensors")}:
        marks = _latent_markers(storage, encoder).read().keys()
        times = Counter(unit.rpartition("-")[0] for unit in marks)
        own = [ids[unit] for unit in marks if unit in ids and times[ids[unit]] == 1]
        found |= {f"{_LATENTS}/{encoder}/{shard}.safetensors" for shard in own}
    return found


def _scrub_table(storage: Storage, name: str, keys: pa.Array) -> None:
    here = pc.is_in(storage.read_table(name, ["key"])["key"], keys)
    if pc.any(here).as_py():
        storage.write_table(name, storage.read_table(name).filter(pc.invert(here)))


def _scrub_latents(storage: Storage, name: str, shard: str, keys: pa.Array) -> None:
    tensors, metadata = _read(storage.read(name))
    held = storage.read_table(f"shards/{shard}.parquet", ["key"])["key"].combine_chunks()
    assert {len(tensor) for tensor in tensors.values()} == {len(held)}, f"{name} does not have its shard's samples"
    left = np.asarray(pc.invert(pc.is_in(held, keys)))
    if left.all():
        return
    expected = fingerprint(held.filter(pa.array(left)).to_pylist())
    metadata = {**metadata, _SUM: "", _KEYS: expected}
    storage.write(name, tensor_file.save({tensor: value[left] for tensor, value in tensors.items()}, metadata))


def settle_latents(storage: Storage, manifest: Manifest | None, scrubbed: Collection[str]) -> None:
    """Bind latents that were scrubbed (of the shards of these names) to the present shards.

    Latents whose shard holds other samples are deleted.
    """
    shards = {entry.name: entry for entry in (manifest.shards if manifest else [])}
    for name in storage.names(_LATENTS):
        _, encoder, file = name.split("/")
        if not file.endswith(".safetensors") or file.removesuffix(".safetensors") not in scrubbed:
            continue
        if _KEYS not in _metadata(storage, name):
            continue
        tensors, metadata = _read(storage.read(name))
        entry = shards.get(file.removesuffix(".safetensors"))
        keys = storage.read_table(entry.table, ["key"])["key"].to_pylist() if entry else []
        if entry is None or fingerprint(keys) != metadata.pop(_KEYS):
            _drop_latents(storage, PurePosixPath(name))
            continue
        data = tensor_file.save(tensors, {**metadata, _SUM: entry.sha256})
        storage.write(name, data)
        facts = {"samples": len(keys), "bytes": len(data)}
        _latent_markers(storage, encoder).mark(f"{entry.name}-{entry.sha256[:12]}", facts)


def _drop_latents(storage: Storage, path: PurePosixPath) -> None:
    """Delete a shard's latents and their marker, so that they are encoded again."""
    markers = _latent_markers(storage, path.parent.name)
    storage.delete(str(path))
    markers.forget(unit for unit in markers.read() if unit.startswith(f"{path.stem}-"))


def _latent_markers(storage: Storage, encoder: str) -> MarkerLog:
    """Return the markers of the job that encodes latents (training.precomputed.latents)."""
    return MarkerLog(storage, f"latents-{encoder}")


def _metadata(storage: Storage, name: str) -> dict[str, str]:
    """Return the metadata of a safetensors file, without reading its tensors."""
    with storage.open(name) as file:
        size = int.from_bytes(file.read(8), "little")
        return dict(json.loads(file.read(size)).get("__metadata__", {}))


def _read(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a safetensors file's tensors and metadata."""
    from safetensors.numpy import load

    size = int.from_bytes(data[:8], "little")
    return load(data), dict(json.loads(data[8 : 8 + size]).get("__metadata__", {}))
