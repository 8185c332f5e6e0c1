"""Rows in any order → rows sorted by key, each key once, in bounded memory

A bucket sort on the local disk. Keys are hashes, so they fill their range evenly: rows are split into slices by the
first bits of their key, and a few neighbouring slices at a time are sorted in memory. Each time the memory is full its
rows become a run: one file, in which each slice is a record batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.records import PLAN_SCHEMA

KEY_BYTES: Final = 16
RUN_BYTES = 96 << 20  # rows held in memory before they become a run
GROUP_BYTES = 48 << 20  # slices sorted at once, unless one alone is larger
_SLICE_BITS: Final = 10
_SLICES: Final = 1 << _SLICE_BITS
_RAW_KEY: Final = pa.binary(KEY_BYTES)
RUN_SCHEMA: Final = PLAN_SCHEMA.set(0, PLAN_SCHEMA.field("key").with_type(_RAW_KEY))
_ORDER: Final = ["key", "extra", "url", "caption", "hash"]  # the least row of a key is kept

Known = Callable[[npt.NDArray[np.bytes_]], npt.NDArray[np.bool_]]  # keys (S16, sorted) → which of them are known


class ExternalKeySort:
    """Sorts rows of PLAN_SCHEMA through files in the folder `scratch`.

    `rows` is the number of rows added; `repeats` (once all are sorted) the number of those with another row's key.
    """

    def __init__(self, scratch: Path) -> None:
        self.rows = self.repeats = 0
        self._scratch = scratch
        self._held: list[pa.Table] = []
        self._held_bytes = 0
        self._runs: list[Path] = []
        self._slice_bytes = np.zeros(_SLICES, np.int64)

    def add(self, table: pa.Table) -> None:
        self.rows += len(table)
        self._held.append(with_raw_keys(table))
        self._held_bytes += table.nbytes
        if self._held_bytes >= RUN_BYTES:
            self._spill()

    def sorted(self, known: Known) -> Iterator[pa.Table]:
        """Yield tables of PLAN_SCHEMA, of bounded size, without the rows whose keys are `known`."""
        for group in self._groups():
            rows, repeats = unique(group, known)
            self.repeats += repeats
            if len(rows):
                yield rows

    def _spill(self) -> None:
        """Write the rows in memory as a run."""
        rows = pa.concat_tables(self._held).combine_chunks()
        self._held, self._held_bytes = [], 0
        rows, bounds = sliced(rows, _SLICE_BITS)
        run = self._scratch / f"run-{len(self._runs):06d}.arrow"
        with pa.OSFile(str(run), "wb") as file, pa.ipc.new_file(file, RUN_SCHEMA) as writer:
            for number in range(_SLICES):
                part = rows.slice(bounds[number], bounds[number + 1] - bounds[number])
                self._slice_bytes[number] += part.nbytes
                (batch,) = part.to_batches() or [pa.RecordBatch.from_pylist([], RUN_SCHEMA)]
                writer.write_batch(batch)
        self._runs.append(run)

    def _groups(self) -> Iterator[pa.Table]:
        """Yield the rows to sort together, group by group, in the order of keys."""
        if not self._runs:
            if self._held:
                yield pa.concat_tables(self._held)
            return
        if self._held:
            self._spill()
        first = size = 0
        for number, more in enumerate([*self._slice_bytes.tolist(), GROUP_BYTES]):
            if number > first and size + more > GROUP_BYTES:
                yield pa.concat_tables([self._slices(run, first, number) for run in self._runs])
                first, size = number, 0
            size += more

    @staticmethod
    def _slices(run: Path, first: int, stop: int) -> pa.Table:
        with pa.OSFile(str(run)) as file:
            reader = pa.ipc.open_file(file)
            return pa.Table.from_batches([reader.get_batch(number) for number in range(first, stop)], RUN_SCHEMA)


def with_raw_keys(table: pa.Table) -> pa.Table:
    """Return rows of PLAN_SCHEMA as rows of RUN_SCHEMA."""
    return table.set_column(0, RUN_SCHEMA.field("key"), raw_keys(table["key"]))


def sliced(rows: pa.Table, bits: int) -> tuple[pa.Table, list[int]]:
    """Return rows of RUN_SCHEMA, in one piece, slice by slice, and where each slice begins.

    A slice is what begins with the same `bits` bits of a key. Its rows keep their order.
    """
    slices = slice_of(key_bytes(rows["key"]), bits)
    order = np.argsort(slices, kind="stable")
    bounds = np.searchsorted(slices[order], np.arange((1 << bits) + 1)).tolist()
    return rows.take(pa.array(order)).combine_chunks(), bounds


def slice_of(keys: npt.NDArray[np.bytes_], bits: int) -> npt.NDArray[Any]:
    """Return the slice of each key: its first `bits` bits, at most 16."""
    return keys.view(">u2")[:: KEY_BYTES // 2] >> (16 - bits)


def unique(rows: pa.Table, known: Known) -> tuple[pa.Table, int]:
    """Return rows of RUN_SCHEMA, sorted, as PLAN_SCHEMA: one of each key not `known`; and how many repeat another."""
    rows = rows.combine_chunks()
    rows = rows.take(pc.sort_indices(rows, [(name, "ascending") for name in _ORDER]))
    keys = key_bytes(rows["key"])
    repeated = np.concatenate([[False], keys[1:] == keys[:-1]]) if len(keys) else np.zeros(0, bool)
    fresh = rows.filter(pa.array(~(repeated | known(keys))))
    if len(fresh):
        fresh = fresh.set_column(0, PLAN_SCHEMA.field("key"), hex_keys(fresh["key"])).cast(PLAN_SCHEMA)
    return fresh, int(repeated.sum())


def raw_keys(keys: pa.ChunkedArray) -> pa.Array:
    """Return hexadecimal keys as 16 bytes each."""
    text = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    raw = b""
    if len(text):
        _, offsets, data = text.buffers()
        start, stop = np.frombuffer(offsets, np.int32)[[text.offset, text.offset + len(text)]].tolist()
        raw = bytes.fromhex(data[start:stop].to_pybytes().decode())
    assert len(raw) == len(text) * KEY_BYTES
    return pa.FixedSizeBinaryArray.from_buffers(_RAW_KEY, len(text), [None, pa.py_buffer(raw)])


def hex_keys(keys: pa.ChunkedArray) -> pa.Array:
    """Return raw keys as hexadecimal text: the inverse of `raw_keys`."""
    text = key_bytes(keys).tobytes().hex().encode()
    offsets = np.arange(0, len(text) + 1, 2 * KEY_BYTES, dtype=np.int32)
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(offsets), pa.py_buffer(text))


def key_bytes(keys: Any) -> npt.NDArray[np.bytes_]:
    """Return raw keys, an array or a column, as numpy's S16, without a copy if they are in one piece."""
    keys = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    start = keys.offset * KEY_BYTES
    return np.frombuffer(keys.buffers()[1], f"S{KEY_BYTES}", len(keys), start) if len(keys) else np.zeros(0, "S16")
