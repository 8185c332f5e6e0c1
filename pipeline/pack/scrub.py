"""Removal of rows from the files derived from images, on workers: captions, latents, text states, reviews

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
from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Resources, fingerprint
from capstan.pipeline.dataset import tensor_file
from capstan.pipeline.dataset.shards import Manifest
from capstan.pipeline.select.pairs import read_pairs, without, write_pairs
from capstan.pipeline.select.review import FOLDER
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, MarkerLog, Piece, Unit, results

log = logging.getLogger(__name__)

_SUM, _KEYS = "shard_sha256", "keys"
_LATENTS: Final = "latents"
_TABLES: Final = 16  # that one worker reads, of those that no marker binds to a shard


class ScrubDerived(Job):
    """The job that rewrites files without the rows that are removed. A unit is a few tables, or one file of latents.

    It may be repeated for a unit at any moment. The keys are those of `pending`, unless the unit has a shard's.
    """

    name, title = "takedown-derived", "remove: captions and latents"

    def __init__(self, storage: Storage, pending: str) -> None:
        self.storage, self._pending = storage, pending

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Yield one piece: the file of latents that is to be deleted, or ""."""
        spec, drop = unit.spec, ""
        if spec["keys"] is None:
            keys = self.storage.read_table(self._pending, ["key"])["key"].combine_chunks()
        else:
            keys = pa.array(spec["keys"], pa.string())
        for name in spec.get("tables", ()):
            _scrub_table(self.storage, name, keys)
        if (name := spec.get("latents")) and _KEYS not in (metadata := _metadata(self.storage, name)):
            if metadata.get(_SUM, "") not in spec["packed"]:
                drop = name
            elif len(keys):
                _scrub_latents(self.storage, name, PurePosixPath(name).stem, keys)
        yield {"drop": drop}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts


def scrub_derived(
    storage: Storage, pending: str, rows: pa.Table, packed: Collection[tuple[str, str]], progress: bool
) -> None:
    """Remove `rows` (columns key and shard), some of which the present shards hold. May be repeated.

    `pending` is the file of the rows. `packed` are the present shards (name, sum). Latents of any other shard may hold
    any row, and are deleted. Files that a marker says to be of a present shard are read only if it holds any of the
    rows: they hold its samples alone.
    """
    by_shard = _by_shard(rows)
    captions, latents = storage.names("captions"), storage.names(_LATENTS)
    bound = _captions_of(storage, captions, packed)  # they hold the rows of one present shard
    others = {(name, sha256) for name, sha256 in packed if name not in by_shard}
    known = {name for name, shard in bound.items() if shard not in by_shard}
    tables = [name for name in [*captions, *storage.names(FOLDER)] if name.endswith(".parquet") and name not in known]
    units = [_tables(name, [name], by_shard[bound[name]]) for name in tables if name in bound]
    loose = [name for name in tables if name not in bound]
    units += [_tables(part[0], part) for part in _parts(loose)]
    encoded, sums = _latents_of(storage, latents, others), dict[str, list[str]]()
    for shard, sha256 in packed:
        sums.setdefault(shard, []).append(sha256)
    for name in latents:
        path = PurePosixPath(name)
        if name not in encoded and path.suffix == ".safetensors":
            spec = {"latents": name, "packed": sums.get(path.stem, []), "keys": by_shard.get(path.stem, [])}
            units.append(Unit(fingerprint(name), spec))
    for facts in results(ScrubDerived(storage, pending), units, Resources(), progress=progress):
        if facts["drop"]:
            log.warning("%s does not belong to the present shard: deleted; encode it again", facts["drop"])
            _drop_latents(storage, PurePosixPath(facts["drop"]))
    keys = rows["key"].combine_chunks()
    if len(judged := read_pairs(storage)) and len(left := without(judged, keys)) < len(judged):
        write_pairs(storage, left)


def _tables(name: str, tables: Sequence[str], keys: list[str] | None = None) -> Unit:
    return Unit(fingerprint(name), {"tables": list(tables), "keys": keys})


def _parts(names: list[str]) -> list[list[str]]:
    return [names[start : start + _TABLES] for start in range(0, len(names), _TABLES)]


def _by_shard(rows: pa.Table) -> dict[str, list[str]]:
    """Return shard → keys of its rows."""
    found: dict[str, list[str]] = {}
    for key, shard in zip(rows["key"].to_pylist(), rows["shard"].to_pylist(), strict=True):
        if shard:
            found.setdefault(shard, []).append(key)
    return found


def _captions_of(storage: Storage, names: list[str], shards: Collection[tuple[str, str]]) -> dict[str, str]:
    """Return the files that a caption job wrote for these shards as they are, and the shard of each."""
    found = dict[str, str]()
    for layer in {name.split("/")[1] for name in names if name.count("/") == 2}:
        marks = MarkerLog(storage, f"recaption-{layer}").read()
        own = [shard for shard, facts in marks.items() if (shard, facts.get("source")) in shards]
        found |= {f"captions/{layer}/{shard}.parquet": shard for shard in own}
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


class Settle(ScrubDerived):
    """The job that binds scrubbed latents to a present shard, which has the samples whose latents they are."""

    name, title = "takedown-latents", "remove: latents"

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Yield one piece: the file, if its shard has other samples; else what its marker says; or nothing."""
        name, entry = unit.spec["latents"], unit.spec["entry"]
        found: dict[str, Any] = {"drop": "", "mark": "", "facts": {}}
        if _KEYS in _metadata(self.storage, name):
            tensors, metadata = _read(self.storage.read(name))
            keys = (
                self.storage.read_table(f"shards/{entry['name']}.parquet", ["key"])["key"].to_pylist() if entry else []
            )
            if entry is None or fingerprint(keys) != metadata.pop(_KEYS):
                found["drop"] = name
            else:
                data = tensor_file.save(tensors, {**metadata, _SUM: entry["sha256"]})
                self.storage.write(name, data)
                found["mark"] = f"{entry['name']}-{entry['sha256'][:12]}"
                found["facts"] = {"samples": len(keys), "bytes": len(data)}
        yield found

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (found,) = pieces
        if found["mark"]:
            encoder = PurePosixPath(unit.spec["latents"]).parent.name
            _latent_markers(self.storage, encoder).mark(found["mark"], found["facts"])
        return {"drop": found["drop"]}


def settle_latents(storage: Storage, manifest: Manifest | None, scrubbed: Collection[str]) -> None:
    """Bind latents that were scrubbed (of the shards of these names) to the present shards.

    Latents whose shard holds other samples are deleted.
    """
    shards = {entry.name: entry for entry in (manifest.shards if manifest else [])}
    paths = [PurePosixPath(name) for name in storage.names(_LATENTS)]
    paths = [path for path in paths if path.suffix == ".safetensors" and path.stem in scrubbed]
    units = [
        Unit(
            fingerprint(str(path)),
            {"latents": str(path), "entry": shards[path.stem].model_dump() if path.stem in shards else None},
        )
        for path in paths
    ]
    done = results(Settle(storage, ""), units, Resources(), progress=False)
    for path, facts in zip(paths, done, strict=True):
        if facts["drop"]:
            _drop_latents(storage, path)


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
