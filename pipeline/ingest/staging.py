"""Staged units → their images: from the staged tar, or, where that was freed, from packed shards.

keep_staged: false    once all is packed, staged tars are removed; tables stay. What was kept is then in the shards
                      only, and what was not kept is nowhere: to keep it after all it must be fetched again.
state/freed.json      says that some tars may have been removed; written before the first one is
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
    """The units as they are now: those whose tar was removed without one, and `freed`."""
    if not storage.exists(_FREED):
        return list(units)
    there = set(storage.names("staged"))
    return [replace(unit, tar="", freed=True) if unit.tar and unit.tar not in there else unit for unit in units]


def free(storage: Storage, units: Iterable[Staged]) -> int:
    """Remove the units' tars; gives how many."""
    tars = [unit.tar for unit in units if unit.tar]
    if tars:
        storage.write(_FREED, b"{}\n")
        storage.delete(*tars)
    return len(tars)


def images(
    storage: Storage, table: str, tar: str, rows: Sequence[int], packed: Sequence[Packed] = ()
) -> Iterator[tuple[int, bytes | None]]:
    """(row, its JPEG or None where it is nowhere) for these rows of a staged table, in order.

    `packed` are looked into for what is not in the staged `tar` ("" where there is none).
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
    """(key, sha256) → where it is packed."""
    found: dict[tuple[str, str], tuple[str, int, int]] = {}
    for tar, table in packed:
        rows = storage.read_table(table, ["key", "sha256", "offset", "size"])
        for key, sha256, offset, size in zip(
            *(rows[name].to_pylist() for name in ("key", "sha256", "offset", "size")), strict=True
        ):
            found[key, sha256] = tar, offset, size
    return found
