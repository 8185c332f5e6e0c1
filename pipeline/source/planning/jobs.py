"""Runs → units, on workers: how many keys each range of slices has, then the units of each range of rows

The driver only sees numbers of rows (and sizes of embedded images, if there are any), from which it says where units
begin: the same units as in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from capstan.pipeline.source.planning.batches import PlannedUnit, known, planned_units
from capstan.pipeline.source.planning.external_sort import KEY_BYTES, Known, key_bytes, raw_keys, slice_of, unique
from capstan.pipeline.source.planning.known_keys import UnitKeys
from capstan.pipeline.source.planning.runs import RawKeys, Runs
from capstan.pipeline.source.planning.unit_tables import image_bytes, write_units
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Unit, report

KEYS: Final = "keys"  # folder of the keys of each range of slices, in order, each once: only those to plan
SIZES: Final = "sizes"  # of their embedded images' sizes


class _Step(Job):
    """A job between the runs in `scratch` and the plan of `dataset`; nobody lists what it writes."""

    def __init__(self, scratch: Storage, dataset: Storage, runs: list[str], bits: int) -> None:
        self.storage, self.dataset, self.bits = scratch, dataset, bits
        self.runs = Runs(scratch, runs)

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts


class CountKeys(_Step):
    """The job that finds the keys to plan. A unit is a range of slices, and with `images` their sizes are wanted."""

    name, title = "plan-keys", "plan: keys"

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Write the keys that are in no batch; yield their number, and how many rows repeat another's key."""
        first, stop = unit.spec["slices"]
        if unit.spec["images"]:
            rows, repeats = unique(self.runs.rows(first, stop), self._in_batches)
            keys = key_bytes(raw_keys(rows["key"])) if len(rows) else np.zeros(0, "S16")
            self.storage.write(f"{SIZES}/{unit.id}", image_bytes(rows).tobytes())
        else:
            keys, repeats = _unique_keys(self.runs.keys(first, stop), self._in_batches)
        self.storage.write(f"{KEYS}/{unit.id}", keys.tobytes())
        report({"samples": unit.spec["rows"]})
        yield {"rows": len(keys), "repeats": repeats}

    @functools.cached_property
    def _in_batches(self) -> Known:
        return known(self.dataset, planned_units(self.dataset))


def _unique_keys(keys: RawKeys, in_batches: Known) -> tuple[RawKeys, int]:
    keys = np.sort(keys)
    different = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, bool)
    repeats = len(keys) - int(different.sum())
    keys = keys[different]
    return keys[~in_batches(keys)], repeats


class WriteUnits(_Step):
    """The job that writes units of the plan. A unit of it is some neighbouring ones, and where their keys are."""

    name, title = "plan-units", "plan: units"

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Write the units; yield the facts of their keys."""
        wanted = np.concatenate([self._keys(*place) for place in unit.spec["keys"]])
        low, high = wanted[:1].tobytes(), wanted[-1:].tobytes()
        first, last = slice_of(wanted[[0, -1]], self.bits).tolist()

        def others(keys: RawKeys) -> Any:
            return wanted[np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)] != keys

        rows, _ = unique(self.runs.rows(first, last + 1, low, high), others)
        if len(rows) != len(wanted):
            raise ValueError(f"{len(rows)} rows for {len(wanted)} keys: the runs are not those that were counted")
        counts, units = unit.spec["counts"], list[PlannedUnit]()
        for number, count in enumerate(counts, unit.spec["first"]):
            units.append(PlannedUnit(unit.spec["batch"], number, count))
        starts = np.cumsum([0, *counts]).tolist()
        parts = ((one, rows.slice(start, one.rows)) for one, start in zip(units, starts, strict=False))
        facts = UnitKeys([], [], [])
        for keys in write_units(parts, self.dataset):
            facts.add(keys)
        report({"samples": len(rows)})
        yield {"first": facts.first, "crc32": facts.crc32}

    def _keys(self, name: str, start: int, stop: int) -> RawKeys:
        data = self.storage.read_range(f"{KEYS}/{name}", KEY_BYTES * start, KEY_BYTES * stop)
        return np.frombuffer(data, f"S{KEY_BYTES}")
