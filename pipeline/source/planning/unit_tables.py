"""Rows sorted by key → units: tables of bounded size, and their keys

The bytes of a unit's table follow from its rows alone, wherever and in whatever pieces they were sorted.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capstan.pipeline.source.planning.batches import PlannedUnit
from capstan.pipeline.source.planning.external_sort import raw_keys
from capstan.pipeline.storage import Storage

UNIT_BYTES = 256 << 20  # embedded images of a unit
_WRITERS: Final = 2
_SMALL_BYTES: Final = 16 << 20

Sizes = npt.NDArray[np.int64]


class Cutter:
    """Says where units end: after `rows` rows, or before that once their embedded images fill UNIT_BYTES."""

    def __init__(self, rows: int) -> None:
        self._most, self._rows, self._bytes = rows, 0, 0

    def take(self, image_bytes: Sizes) -> int:
        """Add rows with images of these sizes to the unit; return how many of them are in it."""
        sizes = self._bytes + np.cumsum(image_bytes[: self._most - self._rows], dtype=np.int64)
        taken = min(len(sizes), int(np.searchsorted(sizes, UNIT_BYTES)) + 1)
        self._rows, self._bytes = self._rows + taken, int(sizes[taken - 1])
        return taken

    def ended(self) -> bool:
        """Return whether the unit is full; if so, begin the next."""
        full = self._rows == self._most or self._bytes >= UNIT_BYTES
        if full:
            self._rows = self._bytes = 0
        return full


def image_bytes(table: pa.Table) -> Sizes:
    """Return the size of each row's embedded image, 0 without one."""
    sizes: Sizes = pc.fill_null(pc.binary_length(table["image"]), 0).to_numpy().astype(np.int64)
    return sizes


def cut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield tables of `rows` rows each: fewer in the last one, and if embedded images fill UNIT_BYTES first."""
    held: list[pa.Table] = []
    cutter = Cutter(rows)
    for table in tables:
        sizes = image_bytes(table)
        while len(table):
            taken = cutter.take(sizes)
            held.append(table.slice(0, taken))
            table, sizes = table.slice(taken), sizes[taken:]
            if cutter.ended():
                yield pa.concat_tables(held)
                held = []
    if held:
        yield pa.concat_tables(held)


def unit_rows(rows: Iterable[Sizes | int], most: int) -> Iterator[int]:
    """Yield the number of rows of each unit, as `cut` does.

    `rows` are the sizes of the rows' embedded images in order, in pieces, or numbers of rows without images.
    """
    held, cutter = 0, Cutter(most)
    for sizes in rows:
        if isinstance(sizes, int):
            held += sizes
            yield from [most] * (held // most)
            held %= most
            continue
        while len(sizes):
            taken = cutter.take(sizes)
            held, sizes = held + taken, sizes[taken:]
            if cutter.ended():
                yield held
                held = 0
    if held:
        yield held


def write_units(units: Iterable[tuple[PlannedUnit, pa.Table]], storage: Storage) -> Iterator[bytes]:
    """Write the units' tables, several small ones at a time; yield the keys of each, raw and in order.

    All are written once the last keys were yielded and the iteration has ended.
    """
    with ThreadPoolExecutor(_WRITERS) as writers:
        writing: deque[Future[None]] = deque()
        for unit, table in units:
            yield raw_keys(table["key"]).buffers()[1].to_pybytes()
            writing.append(writers.submit(_write_unit, storage, unit, table))
            while len(writing) > (_WRITERS if table.nbytes < _SMALL_BYTES else 0):
                writing.popleft().result()
        for left in writing:
            left.result()


def _write_unit(storage: Storage, unit: PlannedUnit, table: pa.Table) -> None:
    """Write a unit's table. Only `file` repeats values; for other columns dictionaries would only cost time.

    Pages end where the pieces of a column do, so the table is made of one piece.
    """
    buffer, whole = io.BytesIO(), table.combine_chunks()
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "use_dictionary": ["file"]}
    pq.write_table(whole, buffer, write_page_checksum=True, **options)
    storage.write(unit.table, buffer.getvalue())
