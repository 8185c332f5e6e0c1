"""Read staged images: from the staged tar or, once freed, from packed shards.

keep_staged: false    once everything is packed, staged tars are removed; their tables stay. Kept images are then in the
                      shards only. Other images are nowhere, and must be fetched again if the recipe keeps them later.
state/freed.json      records that tars may have been removed; written before the first one is
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO, Final

from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.storage import Storage

_FREED: Final = "state/freed.json"
Packed = tuple[str, str]  # a tar, and its table of key, sha256, offset and size


def with_freed(storage: Storage, units: Sequence[Staged]) -> list[Staged]:
    """Return the units in their current state: those whose tar was removed lose it and are marked `freed`."""
    if not storage.exists(_FREED):
        return list(units)
    there = set(storage.names("staged"))
    return [replace(unit, tar="", freed=True) if unit.tar and unit.tar not in there else unit for unit in units]


def free(storage: Storage, units: Iterable[Staged]) -> int:
    """Remove the units' tars; return their number."""
    tars = [unit.tar for unit in units if unit.tar]
    if tars:
        storage.write(_FREED, b"{}\n")
        storage.delete(*tars)
    return len(tars)


def images(
    storage: Storage, table: str, tar: str, rows: Sequence[int], packed: Sequence[Packed] = ()
) -> Iterator[tuple[int, bytes | None]]:
    """Yield (row, its JPEG or None if it is nowhere) for the given rows of a staged table, in order.

    Images that are not in the staged `tar` ("" if there is none) are looked up in `packed`.
    """
    spans = storage.read_table(table, ["key", "sha256", "offset", "size"])
    columns = [spans[name].to_pylist() for name in ("key", "sha256", "offset", "size")]
    elsewhere = _places(storage, packed)
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for row in rows:
            key, sha256, offset, size = (column[row] for column in columns)
            place = (tar, offset, size) if tar and size else elsewhere.get((key, sha256))
            if place is None:
                yield row, None
                continue
            name, offset, size = place
            if name not in files:
                files[name] = stack.enter_context(storage.open(name))
            files[name].seek(offset)
            yield row, files[name].read(size)


def _places(storage: Storage, packed: Sequence[Packed]) -> dict[tuple[str, str], tuple[str, int, int]]:
    """Map (key, sha256) to (tar, offset, size) in the packed shards."""
    found: dict[tuple[str, str], tuple[str, int, int]] = {}
    for tar, table in packed:
        rows = storage.read_table(table, ["key", "sha256", "offset", "size"])
        for key, sha256, offset, size in zip(
            *(rows[name].to_pylist() for name in ("key", "sha256", "offset", "size")), strict=True
        ):
            found[key, sha256] = tar, offset, size
    return found
