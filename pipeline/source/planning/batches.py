"""Batches of planned units: their names, their facts, and which of some keys they have

state/plan/batch-0000/unit-0000-000000.parquet    records.PLAN_SCHEMA, sorted by key
state/plan/batch-0000/keys.bin                    its keys in order, 16 bytes each
state/plan/batch-0000/batch.json                  the batch: its units, their first keys and sums, and the SHA-256
of keys.bin; written last
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.source.planning.external_sort import KEY_BYTES, Known
from capstan.pipeline.source.planning.known_keys import Keys, KnownKeys, UnitKeys
from capstan.pipeline.storage import Storage

log = logging.getLogger(__name__)

_KEYS_BYTES: Final = 1 << 20  # of a file of keys that is hashed, read at once


@dataclass(frozen=True)
class PlannedUnit:
    """A unit of a batch: `id` is "0000-000000" (batch, number), its table is `table`."""

    batch: int
    number: int
    rows: int

    @property
    def id(self) -> str:
        return f"{self.batch:04d}-{self.number:06d}"

    @property
    def table(self) -> str:
        return f"state/plan/batch-{self.batch:04d}/unit-{self.id}.parquet"


FileCounts = list[Any]  # [rows, captions, unused]: JSON


@dataclass
class NewBatch:
    """What a batch was made of: `read` rows, of which `repeats` repeat a key and `captions` have a caption.

    `keys` are the facts of each unit's keys, `keys_sha256` is that of all; `unused` as in `plan.Plan`. `files` are the
    counts of each file that was read, in order: its rows, those with a caption, and what of it was not used.
    """

    units: list[PlannedUnit] = field(default_factory=list)
    keys: UnitKeys = field(default_factory=lambda: UnitKeys([], [], []))
    keys_sha256: str = ""
    read: int = 0
    repeats: int = 0
    captions: int = 0
    unused: dict[str, int] = field(default_factory=dict)
    files: list[FileCounts] = field(default_factory=list)


def batch_name(batch: int) -> str:
    """Return the name of the file of a batch's facts."""
    return f"state/plan/batch-{batch:04d}/batch.json"


def keys_name(batch: int) -> str:
    """Return the name of the file of a batch's keys."""
    return f"state/plan/batch-{batch:04d}/keys.bin"


def planned_units(storage: Storage) -> list[PlannedUnit]:
    """Return all units of all batches, in order."""
    units: list[PlannedUnit] = []
    for batch in itertools.count():  # by name: a listing would return every unit's table too
        try:
            counts = storage.read_json(batch_name(batch), "")["units"]
        except FileNotFoundError:
            return units
        except (DamagedFile, KeyError):
            counts = _restore_batch(storage, batch)
        units += [PlannedUnit(batch, number, rows) for number, rows in enumerate(counts)]
    return units


def write_facts(storage: Storage, batch: int, units: UnitKeys, keys_sha256: str) -> None:
    """Write the facts of a batch, which makes it part of the plan."""
    facts = {"batch": batch, "units": units.counts, "first": units.first, "crc32": units.crc32}
    storage.write(batch_name(batch), json.dumps(facts | {"keys_sha256": keys_sha256}).encode())


def delete_others(storage: Storage, batch: int, units: Sequence[PlannedUnit]) -> None:
    """Delete what interrupted plans have left in the folder of a batch that is to have these units."""
    own = {unit.table for unit in units} | {keys_name(batch)}
    storage.delete(*(name for name in storage.names(_folder(batch)) if name not in own))


def delete_unfinished(storage: Storage) -> None:
    """Delete the folders of batches that were never part of the plan: they have no batch.json."""
    names = storage.names("state/plan")
    finished = {name.rpartition("/")[0] for name in names if name.endswith("/batch.json")}
    storage.delete(*(name for name in names if "/batch-" in name and name.rpartition("/")[0] not in finished))


def _folder(batch: int) -> str:
    return batch_name(batch).rpartition("/")[0]


def _restore_batch(storage: Storage, batch: int) -> list[int]:
    """Write batch.json again from the batch's tables, which were all written before it; return the units' rows."""
    tables = [name for name in storage.names(_folder(batch)) if name.endswith(".parquet")]
    keys = [storage.read_table(name, ["key"])["key"].to_pylist() for name in tables]
    counts = [len(part) for part in keys]
    log.warning("%s is damaged: written again from %d tables", storage.path(batch_name(batch)), len(tables))
    write_facts(storage, batch, UnitKeys.of(_raw(keys), counts), hashlib.sha256(_raw(keys)).hexdigest())
    return counts


def planned_batches(storage: Storage) -> list[str]:
    """Return the files of the batches' facts."""
    return [name for name in storage.names("state/plan") if name.endswith("/batch.json") and _number_of(name).isdigit()]


def _number_of(name: str) -> str:
    return name.split("/")[2].removeprefix("batch-")


def batch_problem(storage: Storage, name: str) -> str | None:
    """Return what is wrong with the file `name` of a batch's facts, or with its keys; write nothing."""
    batch = int(_number_of(name))
    try:
        counts = storage.read_json(name, "")["units"]
        if not _keys_hold(storage, batch, sum(counts)):
            return f"{keys_name(batch)}: missing, or not what was written"
    except (DamagedFile, KeyError, TypeError):
        return f"{name}: damaged; the next build writes it again"
    return None


def _keys_hold(storage: Storage, batch: int, rows: int) -> bool:
    """Return whether a batch's file of keys is what was written. Batches of older versions have no SHA-256."""
    name, digest = keys_name(batch), hashlib.sha256()
    try:
        if storage.size(name) != KEY_BYTES * rows:
            return False
        expected = storage.read_json(batch_name(batch), "").get("keys_sha256")
        if expected is None:
            return True
        with storage.open(name) as file:
            while data := file.read(_KEYS_BYTES):
                digest.update(data)
    except FileNotFoundError:
        return False
    return digest.hexdigest() == expected


def restore_keys(storage: Storage, units: Sequence[PlannedUnit]) -> None:
    """Write files of keys again that are missing or damaged, from the tables of their batches."""
    for batch in sorted({unit.batch for unit in units}):
        own = [unit for unit in units if unit.batch == batch]
        if not _keys_hold(storage, batch, sum(unit.rows for unit in own)):
            log.warning("%s is damaged: written again from the batch's tables", storage.path(keys_name(batch)))
            keys = _raw(storage.read_table(unit.table, ["key"])["key"].to_pylist() for unit in own)
            storage.write(keys_name(batch), keys)


def _raw(keys: Iterable[list[str]]) -> bytes:
    return bytes.fromhex("".join(key for part in keys for key in part))


def known(storage: Storage, units: Sequence[PlannedUnit]) -> Known:
    """Return a function that says which of some keys these units, which are all of their batches, have."""
    batches = [_known_of(storage, batch, list(own)) for batch, own in itertools.groupby(units, lambda one: one.batch)]

    def among(keys: Keys) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(keys), bool)
        for batch in batches:
            try:
                found |= batch.among(keys)
            except DamagedFile:
                restore_keys(storage, units)
                found |= batch.among(keys)
        return found

    return among


def _known_of(storage: Storage, batch: int, units: list[PlannedUnit]) -> KnownKeys:
    facts, counts = storage.read_json(batch_name(batch), ""), [unit.rows for unit in units]
    if "crc32" not in facts:  # of an older version
        restore_keys(storage, units)
        return KnownKeys(storage, keys_name(batch), UnitKeys.of(storage.read(keys_name(batch)), counts))
    return KnownKeys(storage, keys_name(batch), UnitKeys(counts, facts["first"], facts["crc32"]))
