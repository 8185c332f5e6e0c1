"""Read staged images: from the staged tar or, once freed, from packed shards; or from the source's tars.

keep_staged: false    once everything is packed, staged tars are removed; their tables stay. Kept images are then in the
                      shards only. Other images are nowhere, and must be fetched again if the recipe keeps them later.
state/freed.json      records that tars may have been removed; written before the first one is
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO, Final, NamedTuple

import pyarrow as pa

from capstan.pipeline.dataset.damage import note_damage
from capstan.pipeline.dataset.parts import PARTS, part_fields, read_parts
from capstan.pipeline.dataset.shards import read_image, sha256_of
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.ingest.job import Ingest, Staged, failed_table, staged
from capstan.pipeline.ingest.references import REFERENCE_NAMES, SourceTars, moved
from capstan.pipeline.records import CRC32
from capstan.pipeline.source.plan import Plan
from capstan.pipeline.storage import Storage, parquet_bytes

log = logging.getLogger(__name__)

_FREED: Final = "state/freed.json"
_PLACE: Final = ["key", "sha256", "offset", "size", CRC32.name]
Packed = tuple[str, str]  # a tar, and its table of key, sha256, offset and size


def with_freed(storage: Storage, units: Sequence[Staged]) -> list[Staged]:
    """Return the units in their current state: those whose tar was removed lose it and are marked `freed`."""
    there = set(storage.names("staged"))
    return [replace(unit, tar="", freed=True) if unit.tar and unit.tar not in there else unit for unit in units]


def staged_units(job: Ingest, planned: Plan, bad: Mapping[str, str]) -> list[Staged]:
    """Return the staged units in planned order. A quarantined unit (`bad`: unit → reason) gets a table in which every
    row failed.
    """
    done = staged(job.markers.read())
    units = []
    for unit in planned.units:
        if unit.id in done:
            units.append(done[unit.id])
        elif unit.id in bad:
            rows = job.storage.read_table(unit.table, ["key", "url", "caption", "extra"])
            detail = f"its unit was quarantined: {bad[unit.id]}"
            data = parquet_bytes(failed_table(rows, unit.id, "read_error", detail))
            name = f"staged/{unit.id}-{sha256_of(data)[:16]}.parquet"
            if not job.storage.exists(name):
                job.storage.write(name, data)
            units.append(Staged(unit.id, name, "", len(rows)))
    return with_freed(job.storage, units)


def may_be_freed(storage: Storage) -> bool:
    """Return whether staged tars were removed on purpose."""
    return storage.exists(_FREED)


def free(storage: Storage, units: Iterable[Staged]) -> int:
    """Remove the units' tars; return their number."""
    tars = [unit.tar for unit in units if unit.tar]
    if tars:
        storage.write(_FREED, b"{}\n")
        storage.delete(*tars)
    return len(tars)


class Stored(NamedTuple):
    """An image, and the other files of its sample by suffix (dataset.parts)."""

    jpeg: bytes
    parts: dict[str, bytes]


def images(
    storage: Storage,
    table: str,
    tar: str,
    rows: Sequence[int],
    packed: Sequence[Packed] = (),
    *,
    damaged_is_none: bool = False,
) -> Iterator[tuple[int, bytes | None]]:
    """Yield (row, its JPEG or None if it is nowhere) for the given rows of a staged table, in order.

    Images that are not in the staged `tar` ("" if there is none) are looked up in `packed`. An image that is not what
    was written is noted (pipeline.dataset.damage) and raises DamagedFile, unless `damaged_is_none`.
    """
    for row, stored in samples(storage, table, tar, rows, packed, damaged_is_none=damaged_is_none, parts=False):
        yield row, None if stored is None else stored.jpeg


def samples(
    storage: Storage,
    table: str,
    tar: str,
    rows: Sequence[int],
    packed: Sequence[Packed] = (),
    *,
    damaged_is_none: bool = False,
    parts: bool = True,
    refer: bool = True,
) -> Iterator[tuple[int, Stored | None]]:
    """Yield the same as `images`, with the images' parts; without `parts` these are not read.

    An image that is nowhere else is read from the source's tar that its row refers to, unless `refer` is false.
    """
    names = [*_PLACE, *(field.name for field in part_fields(PARTS) if parts)]
    whole = storage.read_table(table, [*names, "width", "height", *REFERENCE_NAMES])
    places = whole.take(pa.array(rows, pa.int64())).to_pylist()
    elsewhere = _places(storage, packed, names)
    with contextlib.ExitStack() as stack:
        files, sources = dict[str, BinaryIO](), SourceTars()
        stack.callback(sources.close)
        for row, place in zip(rows, sources.announced(places) if refer else places, strict=True):
            name, key, own = tar, place["key"], place
            if not tar or not place["size"]:
                name, place = elsewhere.get((key, place["sha256"]), ("", place))
            if not name and refer and own.get("source"):
                yield row, _referred(storage, table, sources, own, damaged_is_none=damaged_is_none)
                continue
            if not name:
                yield row, None
                continue
            if name not in files:
                files[name] = stack.enter_context(storage.open(name))
            path = storage.path(name)
            try:
                jpeg = read_image(files[name], place["offset"], place["size"], place.get(CRC32.name), path)
                yield row, Stored(jpeg, read_parts(files[name], place, path))
            except DamagedFile as error:
                note_damage(storage, name, error.problem)
                if not damaged_is_none:
                    raise
                log.warning("%s, row %s", error, key)
                yield row, None


def _referred(
    storage: Storage, table: str, sources: SourceTars, place: Mapping[str, Any], *, damaged_is_none: bool
) -> Stored | None:
    """Return the image that a staged row refers to. One that is not what the row says is noted, as in `images`."""
    try:
        return Stored(sources.read(place), {})
    except DamagedFile as error:
        note_damage(storage, moved(table), error.problem)
        if not damaged_is_none:
            raise
        log.warning("%s", error)
        return None


def _places(
    storage: Storage, packed: Sequence[Packed], names: list[str]
) -> dict[tuple[str, str], tuple[str, dict[str, Any]]]:
    """Map (key, sha256) to (tar, place of the sample in it) in the packed shards."""
    found: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for tar, table in packed:
        for place in storage.read_table(table, names).to_pylist():
            found[place["key"], place["sha256"]] = (tar, place)
    return found
