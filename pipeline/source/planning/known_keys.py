"""The keys of a batch, in order: read by unit, and compared with what was written

    state/plan/batch-0000/keys.bin      16 bytes each
    state/plan/batch-0000/batch.json    `units`: their numbers of rows; `first`: their first keys; `crc32` of their keys

A few new keys are looked up in the units that may hold them, so that adding rows costs in proportion to what is added,
until there are as many as units. Batches of older versions have no `crc32`, and some no `first`: their file is read
whole, once.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.source.planning.external_sort import KEY_BYTES
from capstan.pipeline.storage import Storage

_READ_BYTES: Final = 1 << 20  # keys read at once

Keys = npt.NDArray[np.bytes_]  # S16, sorted


@dataclass(frozen=True)
class UnitKeys:
    """The keys of each unit of a batch: `counts` of rows, `first` key (hexadecimal) and `crc32` of all."""

    counts: list[int]
    first: list[str]
    crc32: list[int]

    @classmethod
    def of(cls, keys: bytes, counts: Sequence[int]) -> UnitKeys:
        """Return the same for all `keys` of a batch, raw and in order."""
        units, starts = cls([], [], []), [KEY_BYTES * start for start in itertools.accumulate(counts, initial=0)]
        for start, stop in itertools.pairwise(starts):
            units.add(keys[start:stop])
        return units

    def add(self, keys: bytes | memoryview) -> None:
        """Append a unit with these keys."""
        self.counts.append(len(keys) // KEY_BYTES)
        self.first.append(bytes(keys[:KEY_BYTES]).hex())
        self.crc32.append(zlib.crc32(keys))


class KnownKeys:
    """The keys of one batch in the file `name`. Raises DamagedFile if what is read is not what was written."""

    def __init__(self, storage: Storage, name: str, units: UnitKeys) -> None:
        self._storage, self._name, self._units = storage, name, units
        self._starts = np.cumsum([0, *units.counts])
        self._first = np.array([bytes.fromhex(key) for key in units.first], f"S{KEY_BYTES}")

    def among(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which of the keys the batch has."""
        found = np.zeros(len(keys), bool)
        place = np.searchsorted(self._first, keys, side="right") - 1  # of the unit that a key would be in
        wanted = np.unique(place[place >= 0])
        for first, stop in self._runs(wanted.tolist()):
            low, high = np.searchsorted(place, [first, stop])
            held = self._read(first, stop)
            at = np.minimum(np.searchsorted(held, keys[low:high]), len(held) - 1)
            found[low:high] = held[at] == keys[low:high]
        return found

    def _runs(self, units: list[int]) -> Iterator[tuple[int, int]]:
        """Yield ranges [first, stop) of neighbouring units whose keys are read at once."""
        start = end = -1
        for unit in units:
            size = KEY_BYTES * int(self._starts[unit + 1] - self._starts[max(start, 0)])
            if start >= 0 and (unit != end or size > _READ_BYTES):
                yield start, end
                start = -1
            start, end = unit if start < 0 else start, unit + 1
        if start >= 0:
            yield start, end

    def _read(self, first: int, stop: int) -> Keys:
        """Return the keys of units [first, stop)."""
        start, end = (KEY_BYTES * int(self._starts[unit]) for unit in (first, stop))
        try:
            data = self._storage.read_range(self._name, start, end)
        except FileNotFoundError:
            raise DamagedFile(self._storage.path(self._name), "it is missing") from None
        for unit in range(first, stop):
            at, to = (KEY_BYTES * int(self._starts[one] - self._starts[first]) for one in (unit, unit + 1))
            if zlib.crc32(data[at:to]) != self._units.crc32[unit]:
                raise DamagedFile(self._storage.path(self._name), "its keys are not what was written")
        return np.frombuffer(data, f"S{KEY_BYTES}")
