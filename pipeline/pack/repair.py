"""Repair: lost and damaged files are rebuilt from what still holds their content

    shards, ledger, indexes    leave the manifest and are packed again; the whole images of a damaged shard are put on
                               the shelf first (see carryover)
    staged tables              from the ledger and the staged tar
    staged tars                their units are ingested again: whole images come from the tar and from shards, the
                               others from the source

A file is broken if it is missing, or noted as damaged (pipeline.dataset.damage).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
import zlib
from collections.abc import Collection, Mapping
from typing import Any, Final

import pyarrow as pa

from capstan.pipeline.dataset.parts import PARTS, PartPlace, part_columns, part_fields, read_parts
from capstan.pipeline.dataset.shards import (
    MANIFEST,
    Manifest,
    Place,
    ShardEntry,
    check_image,
    sha256_of,
    write_manifest,
)
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.ingest.job import STAGED_SCHEMA, Ingest, Staged
from capstan.pipeline.ingest.references import moved
from capstan.pipeline.ingest.staging import Packed, may_be_freed
from capstan.pipeline.pack.carryover import carried_over, packed_shards, shelve
from capstan.pipeline.records import CRC32, FAILED, REMOVED
from capstan.pipeline.select.derived import parts_of_manifest
from capstan.pipeline.source.plan import Plan
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.pipeline.units import MarkerLog, Unit

log = logging.getLogger(__name__)

_ROUND: Final = "repair"


def drop_broken(storage: Storage, manifest: Manifest | None, damaged: Collection[str]) -> Manifest | None:
    """Take broken shards out of the manifest, so that they are packed again; return it as it is now.

    A broken ledger table or index makes the manifest incomplete, so that all of them are written again. Of the indexes
    outside shards/, only noted damage is seen.
    """
    if manifest is None:
        return None
    present = {*storage.names("shards"), *storage.names("ledger")}
    present |= {name for name in manifest.indexes if not name.startswith("shards/")}
    usable = present - set(damaged)
    bad = [entry for entry in manifest.shards if not usable.issuperset((entry.tar, entry.table, entry.index))]
    others = (*(entry.table for entry in manifest.ledger), *manifest.indexes)
    if not bad and usable.issuperset(others) and not {MANIFEST, "ledger"} & set(damaged):
        return manifest
    for entry in bad:
        log.warning("repair: %s is packed again", entry.name)
        if entry.tar in present:
            _rescue(storage, entry)
    whole = [entry for entry in manifest.shards if entry not in bad]
    manifest = manifest.model_copy(update={"shards": whole, "complete": False})
    write_manifest(storage, manifest)
    markers = MarkerLog(storage, "pack")
    names = {entry.name for entry in bad}
    markers.forget(unit for unit, facts in markers.read().items() if facts.get("name") in names)
    return manifest


def _rescue(storage: Storage, entry: ShardEntry) -> None:
    """Put the images of a broken shard that are whole on the shelf."""
    data = storage.read(entry.tar)
    sound = sha256_of(data) == entry.sha256
    try:
        rows = storage.read_table(entry.table, sha256=entry.table_sha256).to_pylist()
    except (DamagedFile, FileNotFoundError):
        rows = _rows_of(data) if sound else []
    whole = [row for row in rows if _is_whole(data, row, sound)]
    if whole:
        shelve(storage, entry, data, whole)


def _is_whole(data: bytes, row: Mapping[str, Any], sound: bool) -> bool:
    """Return whether an image is what was written. Tars of older versions have no checksums of single images."""
    crc32 = row.get(CRC32.name)
    if crc32 is None:
        return sound
    try:
        check_image(data[row["offset"] : row["offset"] + row["size"]], row["size"], crc32, "")
        read_parts(io.BytesIO(data), row, "")
    except DamagedFile:
        return False
    return True


def _rows_of(data: bytes) -> list[dict[str, Any]]:
    """Return key, sha256, offset and size of the samples of a whole tar, and their parts, by its members."""
    rows: dict[str, dict[str, Any]] = {}
    parts: dict[str, dict[str, PartPlace]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            key, _, suffix = member.name.rpartition(".")
            row = rows.setdefault(key, {"key": key})
            content = data[member.offset_data : member.offset_data + member.size]
            if suffix == "jpg":
                row |= {"offset": member.offset_data, "size": member.size}
            elif suffix == "json":
                row["sha256"] = json.loads(content)["sha256"]
            elif suffix in PARTS:
                parts.setdefault(key, {})[suffix] = PartPlace(member.offset_data, member.size, zlib.crc32(content))
    found = [row for row in rows.values() if "sha256" in row and "offset" in row]
    named = [part for part in PARTS if any(part in one for one in parts.values())]
    columns = part_columns([parts.get(row["key"], {}) for row in found], named)
    return [row | {name: column[index].as_py() for name, column in columns.items()} for index, row in enumerate(found)]


def broken_units(
    job: Ingest, planned: Plan, manifest: Manifest | None, damaged: Collection[str]
) -> tuple[dict[str, Unit], list[str]]:
    """Return units to rebuild, whose staged files are broken, and units to ingest again, which have nothing left."""
    storage, present = job.storage, set(job.storage.names("staged"))
    usable, freed = present - set(damaged), may_be_freed(job.storage)
    plans = {unit.id: unit for unit in planned.units}
    repaired, new = dict[str, Unit](), list[str]()
    for unit, mark in job.markers.read().items():
        if not {"table", "tar", "rows"} <= mark.keys():
            log.warning("repair: the marker of unit %s is damaged: it is ingested again", unit)
            new.append(unit)
            continue
        tar_is_broken = mark["tar"] in damaged or (mark["tar"] and mark["tar"] not in present and not freed)
        reread = moved(mark["table"]) in damaged
        if mark["table"] in usable and not tar_is_broken and not reread:
            continue
        tar = mark["tar"] if mark["tar"] in present else ""
        packed = _shards_of(storage, manifest, Staged(unit, mark["table"], tar, mark["rows"]))
        table = mark["table"] if mark["table"] in usable else _restored(storage, manifest, unit, tar)
        if unit not in plans or not table:
            log.warning("repair: unit %s is ingested again", unit)
            new.append(unit)
            continue
        log.warning("repair: the staged files of unit %s are rebuilt", unit)
        again = {"table": table, "tar": tar, "reasons": [], "round": _ROUND, "packed": packed}
        again["refetch"] = reread or (not mark.get("freed", False) and not (mark["tar"] and not tar and freed))
        again |= {"reread": True} if reread else {}
        repaired[unit] = Unit(unit, {"table": plans[unit].table, "rows": mark["rows"], "again": again})
    return repaired, new


def _shards_of(storage: Storage, manifest: Manifest | None, unit: Staged) -> list[Packed]:
    """Return the shards that may hold images of a unit; those on the shelf may hold any."""
    shelf = carried_over(storage)
    try:
        return shelf + packed_shards(storage, manifest, unit)
    except (DamagedFile, FileNotFoundError):  # the ledger is broken too
        return shelf + [(entry.tar, entry.table) for entry in (manifest.shards if manifest else [])]


def _restored(storage: Storage, manifest: Manifest | None, unit: str, tar: str) -> str:
    """Rebuild the staged table of a unit from its ledger table and its tar; return its name, "" without a ledger."""
    entries = [entry for entry in (manifest.ledger if manifest else []) if entry.name == f"unit-{unit}"]
    try:
        rows = storage.read_table(entries[0].table, sha256=entries[0].sha256).to_pylist() if entries else []
    except (DamagedFile, FileNotFoundError):
        rows = []
    if not rows:
        return ""
    places = _places_in(storage, tar)
    for row in rows:
        failed = row["outcome"] == FAILED or row["reason"] == REMOVED
        place = places.get(row["key"], Place(0, 0, 0, None))
        row |= {"reason": row["reason"] if failed else "", "detail": row["detail"] if failed else ""}
        row |= {"offset": place.offset, "size": place.size, CRC32.name: place.crc32}
    table = pa.Table.from_pylist(rows, STAGED_SCHEMA)
    parts = parts_of_manifest(manifest.recipe) if manifest else []
    columns = part_columns([places[row["key"]].parts if row["key"] in places else {} for row in rows], parts)
    for field, column in zip(part_fields(parts), columns.values(), strict=True):
        table = table.append_column(field, column)
    data = parquet_bytes(table)
    name = f"staged/{unit}-{sha256_of(data)[:16]}.parquet"
    storage.write(name, data)
    return name


def _places_in(storage: Storage, tar: str) -> dict[str, Place]:
    """Return key → place of the images in a staged tar that is whole, by the hash in its name."""
    if not tar:
        return {}
    data = storage.read(tar)
    if hashlib.sha256(data).hexdigest()[:16] != tar.rpartition("-")[2].removesuffix(".tar"):
        return {}
    found: dict[str, Place] = {}
    parts: dict[str, dict[str, PartPlace]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as members:
        for member in members:
            key, _, suffix = member.name.rpartition(".")
            if suffix in PARTS:
                content = data[member.offset_data : member.offset_data + member.size]
                parts[key][suffix] = PartPlace(member.offset_data, member.size, zlib.crc32(content))
            else:
                parts[key] = {}
                found[key] = Place(member.offset_data, member.size, 0, None, parts[key])
    return found
