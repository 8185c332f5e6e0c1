"""Source rows → units: repeats dropped, sorted by key

    state/plan/batch-0000/unit-0000-000000.parquet    records.PLAN_SCHEMA, sorted by key
    state/plan/batch-0000/keys.bin                    its keys in order, 16 bytes each
    state/plan/batch-0000/batch.json                  the batch: its units, their first keys and sums, and the SHA-256
                                                      of keys.bin; written last
    state/plan/source.json                            the source as last planned, and its files, so that planning can
                                                      be skipped, or reads new files alone

Rows whose key is in an earlier batch are dropped; the others become a new batch. Existing batches never change. Only
the key is planned of rows that are blocked (see blocklist.py). The order of samples is decided here, once.

If files were added to the source and none was changed or removed since, all rows of the others are in earlier batches:
only the new files are read, and of the earlier keys those of units that may hold a new row's.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import itertools
import json
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.progress import Progress
from capstan.pipeline.source import SourceReader
from capstan.pipeline.source.blocklist import blocked
from capstan.pipeline.source.planning.external_sort import KEY_BYTES, ExternalKeySort, Known, raw_keys
from capstan.pipeline.source.planning.known_keys import Keys, KnownKeys, UnitKeys
from capstan.pipeline.source.reader import OUTSIDE
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch

log = logging.getLogger(__name__)

UNIT_BYTES = 256 << 20  # embedded images of a unit
_KEYS_BYTES = 1 << 20  # of a file of keys that is hashed, read at once
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
    _write_facts(storage, batch, UnitKeys.of(_raw(keys), counts), hashlib.sha256(_raw(keys)).hexdigest())
    return counts


def _write_facts(storage: Storage, batch: int, units: UnitKeys, keys_sha256: str) -> None:
    facts = {"batch": batch, "units": units.counts, "first": units.first, "crc32": units.crc32}
    storage.write(_batch_name(batch), json.dumps(facts | {"keys_sha256": keys_sha256}).encode())


def units_of_keys(storage: Storage, planned: Plan, keys: Iterable[str]) -> set[PlannedUnit]:
    """Return the units that hold a key, or would if it is not planned: one unit of each batch, by the first keys."""
    wanted, found = sorted(keys), set[PlannedUnit]()
    for _, own in itertools.groupby(planned.units if wanted else [], lambda unit: unit.batch):
        units = list(own)
        counts, batch = [unit.rows for unit in units], units[0].batch
        first = storage.read_json(_batch_name(batch), "").get("first")
        if first is None:  # planned before first keys were written down
            first = UnitKeys.of(storage.read(_keys_of(batch)), counts).first
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
    batch = max((unit.batch for unit in before.units), default=-1) + 1
    files = rows.files()
    planned = _planned_files(seen, before, files)
    with (
        scratch() as folder,
        Progress("plan", None, unit="rows", enabled=progress) as bar,
    ):
        sort, captions = ExternalKeySort(folder), 0
        for table in rows.tables(planned):
            captions += _captions(table)
            sort.add(unwanted.without(table))
            bar.advance(len(table))
        tables = sort.sorted(_known(storage, before.units))
        units, keys, keys_sha256 = _write_batch(tables, batch, recipe.unit.rows, storage, folder)
    made = Plan(before.units + units, sort.rows, sort.repeats, captions, dict(rows.unused))
    if planned:
        made = _added(before, made, units)
    if units:
        _write_facts(storage, batch, keys, keys_sha256)
    counts = {"read": made.read, "repeats": made.repeats, "captions": made.captions, "unused": made.unused}
    record = {"signature": rows.signature, **counts, "files": files}
    storage.write(_SOURCE, json.dumps(record).encode())
    return _warned(made)


def _planned_files(seen: Mapping[str, Any], before: Plan, files: list[str] | None) -> frozenset[str]:
    """Return the files whose rows are all in earlier batches; none if it is not certain, or rows could not be counted.

    The batches must hold no other rows than the source as it was: a row of a new file that they have repeats one of it.
    """
    earlier = frozenset(seen.get("files") or ())
    exact = before.captions is not None and before.rows == before.read - before.repeats
    return earlier if exact and files is not None and earlier <= set(files) else frozenset()


def _added(before: Plan, new: Plan, units: list[PlannedUnit]) -> Plan:
    """Return the plan of a source to which the files of the plan `new` were added, with the fresh rows in `units`."""
    repeats = new.read - sum(unit.rows for unit in units)
    unused = Counter(before.unused) + Counter(new.unused)
    if before.unused.get(OUTSIDE):  # of all files, whether they are new
        unused[OUTSIDE] -= before.unused[OUTSIDE]
    captions = (before.captions or 0) + (new.captions or 0)
    return Plan(new.units, before.read + new.read, before.repeats + repeats, captions, dict(+unused))


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


def _known(storage: Storage, units: Sequence[PlannedUnit]) -> Known:
    """Return a function that says which of some keys earlier batches have."""
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
    facts, counts = storage.read_json(_batch_name(batch), ""), [unit.rows for unit in units]
    if "crc32" not in facts:  # of an older version
        restore_keys(storage, units)
        return KnownKeys(storage, _keys_of(batch), UnitKeys.of(storage.read(_keys_of(batch)), counts))
    return KnownKeys(storage, _keys_of(batch), UnitKeys(counts, facts["first"], facts["crc32"]))


def _write_batch(
    tables: Iterator[pa.Table], batch: int, unit_rows: int, storage: Storage, scratch: Path
) -> tuple[list[PlannedUnit], UnitKeys, str]:
    """Write the units, several small ones at a time, then their keys; return the units, their keys' facts, and the
    SHA-256 of all keys.
    """
    units, facts = list[PlannedUnit](), UnitKeys([], [], [])
    keys, digest = scratch / "keys.bin", hashlib.sha256()
    with keys.open("wb") as file, ThreadPoolExecutor(_WRITERS) as writers:
        writing: deque[Future[None]] = deque()
        for table in _cut(tables, unit_rows):
            unit = PlannedUnit(batch, len(units), len(table))
            units.append(unit)
            raw = memoryview(raw_keys(table["key"]).buffers()[1])
            for known, own in zip(
                vars(facts).values(), vars(UnitKeys.of(bytes(raw), [len(table)])).values(), strict=True
            ):
                known += own
            file.write(raw)
            digest.update(raw)
            writing.append(writers.submit(_write_unit, storage, unit, table))
            while len(writing) > (_WRITERS if table.nbytes < _SMALL_BYTES else 0):
                writing.popleft().result()
        for left in writing:
            left.result()
    if units:
        storage.put(keys, _keys_of(batch))
    return units, facts, digest.hexdigest()


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
