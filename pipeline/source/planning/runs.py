"""Rows of many files → runs on a storage that all workers see, of which each reads a range of keys

    run-UNIT-0000.keys     the rows' keys, 16 bytes each, in the order of slices
    run-UNIT-0000.rows     their other columns: an Arrow stream, compressed, a record batch for each slice that has rows
    run-UNIT-0000.index    numbers of rows, then bytes of the stream, before each slice and at the end (uint32)
    rows.index bytes.index     the same of all runs, slice by slice: what a worker needs of them is one read

A slice is what begins with the same bits of a key (see external_sort.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capstan.pipeline.prefetch import ahead
from capstan.pipeline.source.planning.external_sort import KEY_BYTES, RUN_SCHEMA, key_bytes, sliced, with_raw_keys
from capstan.pipeline.storage import Storage

RUN_BYTES: Final = 64 << 20  # rows held in memory before they become a run
_WITHOUT_KEY: Final = RUN_SCHEMA.remove(0)
_OPTIONS: Final = pa.ipc.IpcWriteOptions(compression="lz4")
_COUNT: Final = 4  # bytes of an entry in an index
_ROWS, _BYTES = "rows.index", "bytes.index"

Counts = npt.NDArray[np.uint32]
RawKeys = npt.NDArray[np.bytes_]  # S16


class RunWriter:
    """Writes rows of PLAN_SCHEMA as runs of one unit of work: `names`, of `nbytes` bytes in memory."""

    def __init__(self, storage: Storage, unit: str, bits: int) -> None:
        self.names: list[str] = []
        self.nbytes = 0
        self._storage, self._unit, self._bits = storage, unit, bits
        self._held: list[pa.Table] = []
        self._held_bytes = 0

    def add(self, table: pa.Table) -> None:
        """Add rows; they are kept in memory until they fill a run."""
        self._held.append(with_raw_keys(table))
        self._held_bytes += table.nbytes
        if self._held_bytes >= RUN_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows in memory as a run."""
        if not self._held:
            return
        rows = pa.concat_tables(self._held).combine_chunks()
        self.nbytes += self._held_bytes
        self._held, self._held_bytes = [], 0
        rows, bounds = sliced(rows, self._bits)
        name = f"run-{self._unit}-{len(self.names):04d}"
        self._storage.write(f"{name}.keys", key_bytes(rows["key"]).tobytes())
        rows, places, stream = rows.remove_column(0), [0], pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, _WITHOUT_KEY, options=_OPTIONS) as writer:
            for start, stop in itertools.pairwise(bounds):
                if stop > start:
                    (batch,) = rows.slice(start, stop - start).to_batches()
                    writer.write_batch(batch)
                places.append(stream.tell())
        self._storage.write(f"{name}.rows", stream.getvalue().to_pybytes())
        self._storage.write(f"{name}.index", np.array([bounds, places], np.uint32).tobytes())
        self.names.append(name)


def write_index(storage: Storage, names: Sequence[str], bits: int) -> npt.NDArray[np.int64]:
    """Write the index of all runs; return the number of rows in each slice."""
    data = storage.read_many(f"{name}.index" for name in names).values()
    index: Counts = np.frombuffer(b"".join(data), np.uint32).reshape(len(names), 2, (1 << bits) + 1)
    for name, of in ((_ROWS, 0), (_BYTES, 1)):
        storage.write(name, index[:, of].T.tobytes())
    rows: npt.NDArray[np.int64] = np.diff(index[:, 0].astype(np.int64).sum(axis=0))
    return rows


@dataclass(frozen=True)
class Runs:
    """All runs, in the order in which their rows were read."""

    storage: Storage
    names: Sequence[str]

    def keys(self, first: int, stop: int) -> RawKeys:
        """Return the keys in slices [first, stop), in no order."""
        return np.concatenate([np.zeros(0, "S16"), *(keys for _, keys in self._keys(first, stop))])

    def rows(self, first: int, stop: int, low: bytes = b"", high: bytes = b"\xff" * KEY_BYTES) -> pa.Table:
        """Return the rows (RUN_SCHEMA) in slices [first, stop) whose keys are in [low, high]."""
        starts, stops = self._places(_BYTES, first), self._places(_BYTES, stop)

        def read(item: tuple[int, RawKeys]) -> pa.Table:
            number, keys = item
            place = int(starts[number]), int(stops[number])
            rows = _decoded(self.storage.read_range(f"{self.names[number]}.rows", *place))
            raw = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(keys)])
            rows = rows.add_column(0, RUN_SCHEMA.field("key"), raw)
            wanted = (keys >= low) & (keys <= high)
            return rows if wanted.all() else rows.filter(pa.array(wanted))

        return pa.concat_tables([RUN_SCHEMA.empty_table(), *ahead(read, self._keys(first, stop))])

    def _keys(self, first: int, stop: int) -> Iterator[tuple[int, RawKeys]]:
        """Yield the number and the keys of each run that has any in slices [first, stop)."""
        starts, stops = self._places(_ROWS, first), self._places(_ROWS, stop)

        def read(number: int) -> tuple[int, RawKeys]:
            place = KEY_BYTES * int(starts[number]), KEY_BYTES * int(stops[number])
            return number, np.frombuffer(self.storage.read_range(f"{self.names[number]}.keys", *place), "S16")

        return ahead(read, np.nonzero(stops > starts)[0].tolist())

    def _places(self, index: str, number: int) -> Counts:
        """Return an index's entries of all runs at slice `number`."""
        size = _COUNT * len(self.names)
        return np.frombuffer(self.storage.read_range(index, number * size, (number + 1) * size), np.uint32)


def _decoded(data: bytes) -> pa.Table:
    """Return the rows of some messages of a stream, which may begin with that of its schema."""
    messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(data))
    batches = [pa.ipc.read_record_batch(one, _WITHOUT_KEY) for one in messages if one.type == "record batch"]
    return pa.Table.from_batches(batches, _WITHOUT_KEY)
