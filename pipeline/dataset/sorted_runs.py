"""Sorted runs: tables sorted by a hash; the rows of some hashes are read without the others

A run is a Parquet file with a column `hash` (uint64), sorted by it. Row groups are small, and the footer has the range
of each: a reader that wants a few hashes, or a range of them, reads the footer and the row groups that may hold them.
Hashes are evenly distributed, so that ranges of equal width hold about as many rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch

HASH: Final = pa.field("hash", pa.uint64(), nullable=False)
GROUP_ROWS: Final = 1 << 16
_SPACE: Final = 1 << 64  # hashes

Hashes = npt.NDArray[np.uint64]


def hash_of(digits: str) -> int:
    """Return the hash of a digest, from its first 16 hexadecimal digits."""
    return int(digits[:16], 16)


def ranges(count: int) -> list[tuple[int, int]]:
    """Return `count` ranges [low, high) of equal width that hold all hashes.

    >>> ranges(2) == [(0, 1 << 63), (1 << 63, 1 << 64)]
    True
    """
    bounds = [_SPACE * number // count for number in range(count + 1)]
    return list(itertools.pairwise(bounds))


def write_run(storage: Storage, name: str, table: pa.Table) -> None:
    """Publish a table with a column `hash` as a run. Rows with equal hashes keep their order."""
    order = np.argsort(table[HASH.name].to_numpy(), kind="stable")
    with scratch() as folder:
        path = folder / "run.parquet"
        pq.write_table(
            table.take(pa.array(order)), path, compression="zstd", row_group_size=GROUP_ROWS, write_page_checksum=True
        )
        storage.put(path, name)


def rows_between(storage: Storage, name: str, low: int, high: int, columns: Iterable[str] | None = None) -> pa.Table:
    """Return a run's rows with hashes in [low, high), in order. Raises DamagedFile."""
    table = _read(storage, name, lambda least, most: most >= low and least < high, columns)
    hashes = table[HASH.name].to_numpy()
    start, stop = (_place(hashes, bound) for bound in (low, high))
    return table.slice(start, stop - start)


def rows_with(storage: Storage, name: str, wanted: Hashes, columns: Iterable[str] | None = None) -> pa.Table:
    """Return a run's rows with a hash among `wanted` (sorted), in order. Raises DamagedFile."""

    def may_hold(least: int, most: int) -> bool:
        at = _place(wanted, least)
        return at < len(wanted) and int(wanted[at]) <= most

    table = _read(storage, name, may_hold, columns)
    return table.filter(pc.is_in(table[HASH.name], pa.array(wanted)))


def _place(hashes: Hashes, bound: int) -> int:
    """Return the place of the first hash that is not below `bound`, which may be one more than the largest."""
    return len(hashes) if bound >= _SPACE else int(np.searchsorted(hashes, np.uint64(bound)))


def _read(storage: Storage, name: str, may_hold: Any, columns: Iterable[str] | None) -> pa.Table:
    """Return the rows of the row groups whose range `may_hold` what is wanted."""
    try:
        with storage.open(name) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            place = file.schema_arrow.get_field_index(HASH.name)
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            bounds = [group.column(place).statistics if group.num_rows else None for group in groups]
            chosen = [number for number, found in enumerate(bounds) if found and may_hold(found.min, found.max)]
            names = None if columns is None else list(dict.fromkeys([HASH.name, *columns]))
            return file.read_row_groups(chosen, columns=names)
    except (pa.ArrowException, OSError, AttributeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DamagedFile(storage.path(name), f"cannot be read as a sorted run: {error}") from None
