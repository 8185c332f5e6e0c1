"""Carry-over of images that only packed shards hold, before repacking

New shards take the names of old ones, so old shards that are still needed are copied first.

    shelf/<hash>.tar, .parquet    copies of a shard and of its table, kept until everything is packed
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capstan.pipeline.dataset.parts import PARTS, part_fields, parts_in
from capstan.pipeline.dataset.shards import Manifest, ShardEntry
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.ingest.references import REFERENCE_NAMES, is_there
from capstan.pipeline.ingest.staging import Packed
from capstan.pipeline.records import CRC32, SHARD_SCHEMA
from capstan.pipeline.select.conditions import raw_digits
from capstan.pipeline.select.decide import Decided, shard_name
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch

_COPY_BYTES = 16 << 20
Names = npt.NDArray[np.bytes_]  # key and SHA-256 of samples, 48 raw bytes each


def carry_over(
    storage: Storage, manifest: Manifest | None, decisions: Decided, shards: Iterable[str]
) -> dict[str, list[Packed]]:
    """Copy the packed shards that hold images which the new `shards` need and which are not staged.

    Returns, for each new shard that needs any, the copies to take its images from. Raises RecipeError, before anything
    is copied, if some images are neither staged nor packed.
    """
    rows = _unstaged(storage, decisions, shards)
    if not len(rows):
        return {}
    names = _names(decisions.key[rows], decisions.sha256[rows])
    order = np.argsort(names)
    wanted, goal, found = names[order], decisions.shard[rows[order]], np.zeros(len(rows), bool)
    sources = dict[str, list[Packed]]()

    def assign(copy: Packed, new: npt.NDArray[np.int64]) -> None:
        for number in np.unique(goal[new]).tolist():
            sources.setdefault(shard_name(number), []).append(copy)

    on_shelf = carried_over(storage)
    for tar, table in on_shelf:
        assign((tar, table), _find(storage, table, wanted, found))
    shelved, needed = {tar for tar, _ in on_shelf}, list[ShardEntry]()
    for entry in manifest.shards if manifest else []:
        if _shelved(entry) not in shelved and not found.all():
            new = _find(storage, entry.table, wanted, found, sha256=entry.table_sha256)
            needed += [entry] * bool(len(new))
            assign((_shelved(entry), _table(_shelved(entry))), new)
    if missing := int((~found).sum()):
        problem = f"{missing:,} of the kept rows no longer have an image: keep_staged: false freed them, or it was lost"
        raise RecipeError(
            "select", problem, "fetch them again with `capstan build RECIPE --retry freed`, or keep fewer"
        )
    for entry in needed:
        _copy(storage, entry)
    return sources


def lost_rows(storage: Storage, manifest: Manifest | None, decisions: Decided) -> npt.NDArray[np.int64]:
    """Return the kept rows whose images are neither staged nor packed."""
    rows = _unstaged(storage, decisions)
    names = _names(decisions.key[rows], decisions.sha256[rows])
    order = np.argsort(names)
    found = np.zeros(len(rows), bool)
    tables = [(table, "") for _, table in carried_over(storage)]
    tables += [(entry.table, entry.table_sha256) for entry in (manifest.shards if manifest else [])]
    for table, sha256 in tables if len(rows) else ():
        _find(storage, table, names[order], found, sha256=sha256)
    return np.sort(rows[order[~found]])


def packed_shards(storage: Storage, manifest: Manifest | None, unit: Staged) -> list[Packed]:
    """Return (tar, table) of the shards that hold images of a unit, by its ledger table."""
    name = f"unit-{unit.unit}"
    if manifest is None or name not in {entry.name for entry in manifest.ledger}:
        return []
    shards = set(storage.read_table(f"ledger/{name}.parquet", ["shard"])["shard"].unique().to_pylist())
    return [(entry.tar, entry.table) for entry in manifest.shards if entry.name in shards]


def _unstaged(storage: Storage, decisions: Decided, shards: Iterable[str] | None = None) -> npt.NDArray[np.int64]:
    """Return the kept rows (of `shards`, default all) whose images are not staged."""
    found = [np.zeros(0, np.int64)]
    if any(unit.freed for unit in decisions.units):
        count = int(decisions.shard.max(initial=-1)) + 1  # some of these shards may be empty
        numbers = {shard_name(number): number for number in range(count)}
        requested = np.zeros(count + 1, bool)  # the last element is for rows of no shard
        requested[[numbers[shard] for shard in (numbers if shards is None else shards)]] = True
        for unit, start in zip(decisions.units, decisions.starts, strict=False):
            if unit.freed:
                table = storage.read_table(unit.table, ["size", *REFERENCE_NAMES])
                gone = ((table["size"].to_numpy() == 0) | (not unit.tar)) & ~is_there(table)
                found.append(start + np.nonzero(gone & requested[decisions.shard[start : start + unit.rows]])[0])
    return np.concatenate(found)


def clear(storage: Storage) -> None:
    """Delete the copies, once everything is packed."""
    storage.delete(*storage.names("shelf"))


def _find(
    storage: Storage, table: str, wanted: Names, found: npt.NDArray[np.bool_], *, sha256: str = ""
) -> npt.NDArray[np.int64]:
    """Mark in `found` which of the (sorted) `wanted` a shard holds; return the places of those that are new."""
    rows = storage.read_table(table, ["key", "sha256"], sha256=sha256)
    names = _names(raw_digits(rows["key"], 16), raw_digits(rows["sha256"], 32))
    place = np.minimum(np.searchsorted(wanted, names), len(wanted) - 1)
    new = place[(wanted[place] == names) & ~found[place]]
    found[new] = True
    return new


def _names(key: Names, sha256: Names) -> Names:
    both = np.concatenate([key.view(np.uint8).reshape(-1, 16), sha256.view(np.uint8).reshape(-1, 32)], axis=1)
    return np.ascontiguousarray(both).view("S48").reshape(-1)


def carried_over(storage: Storage) -> list[Packed]:
    """Return the copies that are complete: their table, which is written last, exists."""
    names = set(storage.names("shelf"))
    return sorted((name, _table(name)) for name in names if name.endswith(".tar") and _table(name) in names)


def shelve(storage: Storage, entry: ShardEntry, tar: bytes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the tar of a shard on the shelf, with a table of those of its `rows` that may be used."""
    schema = pa.schema([*(SHARD_SCHEMA.field(name) for name in ("key", "sha256", "offset", "size")), CRC32])
    schema = pa.schema([*schema, *part_fields(parts_in(rows[0] if rows else ()))])
    storage.write(_shelved(entry), tar)
    storage.write_table(_table(_shelved(entry)), pa.Table.from_pylist(list(rows), schema))


def _shelved(entry: ShardEntry) -> str:
    return f"shelf/{entry.sha256[:16]}.tar"


def _table(tar: str) -> str:
    return f"{tar.removesuffix('.tar')}.parquet"


def _copy(storage: Storage, entry: ShardEntry) -> None:
    tar, digest = _shelved(entry), hashlib.sha256()
    with scratch() as folder:
        copy = folder / "shard.tar"
        with storage.open(entry.tar) as source, copy.open("wb") as target:
            while data := source.read(_COPY_BYTES):
                target.write(data)
                digest.update(data)
        if digest.hexdigest() != entry.sha256:
            raise DamagedFile(f"{storage.url}/{entry.tar}", "its SHA-256 is not the one in dataset.json")
        storage.put(copy, tar)
    columns = ["key", "sha256", "offset", "size", CRC32.name, *(field.name for field in part_fields(PARTS))]
    table: pa.Table = storage.read_table(entry.table, columns, sha256=entry.table_sha256)
    storage.write_table(_table(tar), table)
