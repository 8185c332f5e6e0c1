"""Source rows → units: repeats dropped, sorted by key

    state/plan/batch-0000/unit-0000-000000.parquet    records.PLAN_SCHEMA, sorted by key
    state/plan/batch-0000/keys.bin                    its keys in order, 16 bytes each
    state/plan/batch-0000/batch.json                  the batch: its units, their first keys, and the SHA-256 of
                                                      keys.bin; written last
    state/plan/source.json                            the source as last planned, so that planning can be skipped

Rows whose key is in an earlier batch are dropped; the others become a new batch. Existing batches never change. Only
the key is planned of rows that are blocked (see blocklist.py). The order of samples is decided here, once.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import itertools
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.progress import Progress
from capstan.pipeline.source import SourceReader
from capstan.pipeline.source.blocklist import blocked
from capstan.pipeline.source.external_sort import KEY_BYTES, ExternalKeySort, raw_keys
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch

log = logging.getLogger(__name__)

UNIT_BYTES = 256 << 20  # embedded images of a unit
_KEYS_BYTES = 1 << 20  # keys of an earlier batch read at once
_WRITERS = 2
_SMALL_BYTES = 16 << 20
_SOURCE = "state/plan/source.json"


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


@dataclass(frozen=True)
class Plan:
    """All units of all batches, in order.

    The current source has `read` rows; `repeats` of them repeat a key, `captions` have a caption (None: planned by a
    version that did not count them). `unused` counts by suffix the files and tar members that no row was made of.
    """

    units: list[PlannedUnit]
    read: int
    repeats: int
    captions: int | None = None
    unused: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)

    def coverage(self) -> str:
        """Return in words how many rows have a caption, and what was not used: "" if that was not counted."""
        if self.captions is None:
            return ""
        if not self.read:
            return "the source has no rows"
        message = f"{self.captions} of {self.read} rows have a caption"
        common = sorted(self.unused.items(), key=lambda item: (-item[1], item[0]))
        if common:
            kinds = ", ".join(suffix for suffix, _ in common[:5]) + (", …" if len(common) > 5 else "")
            message += f"; {sum(self.unused.values())} files or tar members ({kinds}) were not used"
        return message


def _keys_of(batch: int) -> str:
    return f"state/plan/batch-{batch:04d}/keys.bin"


def read_plan(storage: Storage) -> Plan:
    """Return the plan in `storage`, without reading the source."""
    units: list[PlannedUnit] = []
    for batch in itertools.count():  # by name: a listing would return every unit's table too
        try:
            counts = storage.read_json(_batch_name(batch), "")["units"]
        except FileNotFoundError:
            break
        except (DamagedFile, KeyError):
            counts = _restore_batch(storage, batch)
        units += [PlannedUnit(batch, number, rows) for number, rows in enumerate(counts)]
    seen = _read_source(storage)
    return Plan(units, seen.get("read", 0), seen.get("repeats", 0), seen.get("captions"), seen.get("unused", {}))


def _read_source(storage: Storage) -> dict[str, Any]:
    """Return the record of the source as planned last; {} if there is none, so that it is planned again."""
    try:
        return storage.read_json(_SOURCE, "")
    except FileNotFoundError:
        return {}
    except DamagedFile as error:
        log.warning("%s: %s; the source is planned again", error.file, error.problem)
        return {}


def _restore_batch(storage: Storage, batch: int) -> list[int]:
    """Write batch.json again from the batch's tables, which were all written before it; return the units' rows."""
    folder = _batch_name(batch).rpartition("/")[0]
    tables = [name for name in storage.names(folder) if name.endswith(".parquet")]
    keys = [storage.read_table(name, ["key"])["key"].to_pylist() for name in tables]
    counts = [len(part) for part in keys]
    log.warning("%s is damaged: written again from %d tables", storage.path(_batch_name(batch)), len(tables))
    _write_facts(storage, batch, counts, _first_keys(_raw(keys), counts), hashlib.sha256(_raw(keys)).hexdigest())
    return counts


def _write_facts(storage: Storage, batch: int, counts: list[int], first: list[str], keys_sha256: str) -> None:
    facts = {"batch": batch, "units": counts, "first": first, "keys_sha256": keys_sha256}
    storage.write(_batch_name(batch), json.dumps(facts).encode())


def _first_keys(keys: bytes, counts: list[int]) -> list[str]:
    """Return the first key of each unit; `keys` are all keys of their batch, raw and in order."""
    starts = [KEY_BYTES * start for start in itertools.accumulate(counts, initial=0)][:-1]
    return [keys[start : start + KEY_BYTES].hex() for start in starts]


def units_of_keys(storage: Storage, planned: Plan, keys: Iterable[str]) -> set[PlannedUnit]:
    """Return the units that hold a key, or would if it is not planned: one unit of each batch, by the first keys."""
    wanted, found = sorted(keys), set[PlannedUnit]()
    for _, own in itertools.groupby(planned.units if wanted else [], lambda unit: unit.batch):
        units = list(own)
        counts, batch = [unit.rows for unit in units], units[0].batch
        first = storage.read_json(_batch_name(batch), "").get("first")
        if first is None:  # planned before first keys were written down
            first = _first_keys(storage.read(_keys_of(batch)), counts)
        found |= {units[max(bisect.bisect_right(first, key) - 1, 0)] for key in wanted}
    return found


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
            return f"{_keys_of(batch)}: missing, or not what was written"
    except (DamagedFile, KeyError, TypeError):
        return f"{name}: damaged; the next build writes it again"
    return None


def _keys_hold(storage: Storage, batch: int, rows: int) -> bool:
    """Return whether a batch's file of keys is what was written. Batches of older versions have no SHA-256."""
    name, digest = _keys_of(batch), hashlib.sha256()
    try:
        if storage.size(name) != KEY_BYTES * rows:
            return False
        expected = storage.read_json(_batch_name(batch), "").get("keys_sha256")
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
            log.warning("%s is damaged: written again from the batch's tables", storage.path(_keys_of(batch)))
            keys = _raw(storage.read_table(unit.table, ["key"])["key"].to_pylist() for unit in own)
            storage.write(_keys_of(batch), keys)


def _raw(keys: Iterable[list[str]]) -> bytes:
    return bytes.fromhex("".join(key for part in keys for key in part))


def _batch_name(batch: int) -> str:
    return f"state/plan/batch-{batch:04d}/batch.json"


def plan(recipe: Recipe, storage: Storage, *, progress: bool = True, rows: SourceReader | None = None) -> Plan:
    """Add a batch for the source's rows that no batch holds yet; return the whole plan.

    `rows` are the source's, if they are not those of images. Raises RecipeError for a source that cannot be read.
    """
    rows = rows or SourceReader(recipe)
    seen = _read_source(storage)
    if seen.get("signature") == rows.signature:
        return _warned(read_plan(storage))
    before = read_plan(storage)
    unwanted = blocked(recipe, storage)
    earlier = sorted({unit.batch for unit in before.units})
    batch = earlier[-1] + 1 if earlier else 0
    restore_keys(storage, before.units)
    with (
        scratch() as folder,
        Progress("plan", None, unit="rows", enabled=progress) as bar,
    ):
        sort, captions = ExternalKeySort(folder), 0
        for table in rows.tables():
            captions += _captions(table)
            sort.add(unwanted.without(table))
            bar.advance(len(table))
        units, first, keys_sha256 = _write_batch(
            sort.sorted(_Known(storage, earlier)), batch, recipe.unit.rows, storage, folder
        )
    made = Plan(before.units + units, sort.rows, sort.repeats, captions, dict(rows.unused))
    if units:
        _write_facts(storage, batch, [unit.rows for unit in units], first, keys_sha256)
    counts = {"read": made.read, "repeats": made.repeats, "captions": captions, "unused": made.unused}
    storage.write(_SOURCE, json.dumps({"signature": rows.signature, **counts}).encode())
    return _warned(made)


def _warned(made: Plan) -> Plan:
    if made.read and (made.unused or made.captions == 0):
        log.warning("source: %s", made.coverage())
    return made


def survey(recipe: Recipe, most: int) -> Plan:
    """Read about the first `most` rows of the source and count captions, without planning them.

    Raises RecipeError for a source that cannot be read.
    """
    rows = SourceReader(recipe)
    read = captions = 0
    with contextlib.closing(rows.tables()) as found:
        for table in found:
            read, captions = read + len(table), captions + _captions(table)
            if read >= most:
                break
    return Plan([], read, 0, captions, dict(rows.unused))


def _captions(table: pa.Table) -> int:
    return int(pc.sum(pc.not_equal(table["caption"], "")).as_py() or 0)


class _Known:
    """The keys of earlier batches, read in order and in blocks; each call must have a higher bound."""

    def __init__(self, storage: Storage, batches: list[int]) -> None:
        self._batches = [_Keys(storage, batch) for batch in batches]

    def __call__(self, bound: bytes) -> Iterator[pa.Array]:
        """Yield the raw keys below `bound` that were not yielded yet, block by block."""
        for batch in self._batches:
            for block in batch.below(bound):
                size = len(block) // KEY_BYTES
                yield pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), size, [None, pa.py_buffer(block)])


class _Keys:
    """The sorted keys of one batch."""

    def __init__(self, storage: Storage, batch: int) -> None:
        self._storage, self._name, self._block, self._at = storage, _keys_of(batch), b"", 0
        try:
            self._size = storage.size(self._name)
        except FileNotFoundError:
            problem = f"{storage.url} was planned by an older Capstan"
            raise RecipeError("dataset", problem, "choose a new folder, or remove this one") from None

    def below(self, bound: bytes) -> Iterator[bytes]:
        while True:
            count = bisect.bisect_left(range(len(self._block) // KEY_BYTES), bound, key=self._key) * KEY_BYTES
            found, self._block = self._block[:count], self._block[count:]
            if found:
                yield found
            if self._block or self._at == self._size:
                return
            stop = min(self._size, self._at + _KEYS_BYTES)
            self._block, self._at = self._storage.read_range(self._name, self._at, stop), stop

    def _key(self, number: int) -> bytes:
        return self._block[number * KEY_BYTES : (number + 1) * KEY_BYTES]


def _write_batch(
    tables: Iterator[pa.Table], batch: int, unit_rows: int, storage: Storage, scratch: Path
) -> tuple[list[PlannedUnit], list[str], str]:
    """Write the units, several small ones at a time, then their keys; return the units, their first keys, and the
    SHA-256 of all keys.
    """
    units, first = list[PlannedUnit](), list[str]()
    keys, digest = scratch / "keys.bin", hashlib.sha256()
    with keys.open("wb") as file, ThreadPoolExecutor(_WRITERS) as writers:
        writing: deque[Future[None]] = deque()
        for table in _cut(tables, unit_rows):
            unit = PlannedUnit(batch, len(units), len(table))
            units.append(unit)
            first.append(table["key"][0].as_py())
            raw = memoryview(raw_keys(table["key"]).buffers()[1])
            file.write(raw)
            digest.update(raw)
            writing.append(writers.submit(_write_unit, storage, unit, table))
            while len(writing) > (_WRITERS if table.nbytes < _SMALL_BYTES else 0):
                writing.popleft().result()
        for left in writing:
            left.result()
    if units:
        storage.put(keys, _keys_of(batch))
    return units, first, digest.hexdigest()


def _write_unit(storage: Storage, unit: PlannedUnit, table: pa.Table) -> None:
    """Write a unit's table. Only `file` repeats values; for other columns dictionaries would only cost time."""
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression="zstd", compression_level=1, use_dictionary=["file"], write_page_checksum=True
    )
    storage.write(unit.table, buffer.getvalue())


def _cut(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield tables of `rows` rows each: fewer in the last one, and if embedded images fill UNIT_BYTES first."""
    held: list[pa.Table] = []
    count = size = 0
    for table in tables:
        while len(table):
            sizes = size + np.cumsum(pc.fill_null(pc.binary_length(table["image"]), 0).to_numpy(), dtype=np.int64)
            fits = int(np.searchsorted(sizes, UNIT_BYTES)) + 1
            take = table.slice(0, min(rows - count, fits))
            table = table.slice(len(take))
            held.append(take)
            count, size = count + len(take), int(sizes[len(take) - 1])
            if count == rows or size >= UNIT_BYTES:
                yield pa.concat_tables(held)
                held, count, size = [], 0, 0
    if count:
        yield pa.concat_tables(held)
