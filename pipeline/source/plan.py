"""Source rows → units: repeats dropped, sorted by key

    state/plan/batch-0000/unit-0000-000000.parquet    records.PLAN_SCHEMA, sorted by key
    state/plan/batch-0000/keys.bin                    its keys in order, 16 bytes each
    state/plan/batch-0000/batch.json                  the batch: its units, their first keys and sums, and the SHA-256
                                                      of keys.bin; written last
    state/plan/source.json                            the source as last planned, and its files, so that planning can
                                                      be skipped, or reads new files alone

Rows whose key is in an earlier batch are dropped; the others become a new batch. Existing batches never change. Only
the key is planned of rows that are blocked (see blocklist.py). The order of samples is decided here, once.

All rows of files that are in the source as planned last are in earlier batches, so only the others are read, and of the
earlier keys those of units that may hold one of their rows. If any was changed or removed, that is so for large sources
only: it is not known then how many rows repeat a key.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.progress import Progress
from capstan.pipeline.source import SourceReader
from capstan.pipeline.source.blocklist import blocked
from capstan.pipeline.source.columns import captions_in
from capstan.pipeline.source.plan_on_workers import BatchOnWorkers, counted, discard, is_large, on_workers
from capstan.pipeline.source.planning.batches import (
    FileCounts,
    NewBatch,
    PlannedUnit,
    batch_name,
    delete_others,
    keys_name,
    known,
    planned_units,
    write_facts,
)
from capstan.pipeline.source.planning.external_sort import ExternalKeySort
from capstan.pipeline.source.planning.known_keys import UnitKeys
from capstan.pipeline.source.planning.unit_tables import cut, write_units
from capstan.pipeline.source.reader import OUTSIDE, SourcePart
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch

log = logging.getLogger(__name__)

_SOURCE: Final = "state/plan/source.json"


@dataclass(frozen=True)
class Plan:
    """All units of all batches, in order.

    The current source has `read` rows. `repeats` of them repeat a key (None: a large source changed, and only what
    changed was read), `captions` have a caption (None: planned by a version that did not count them). `unused` counts
    the files and tar members that no row was made of, by suffix.
    """

    units: list[PlannedUnit]
    read: int
    repeats: int | None
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


def read_plan(storage: Storage) -> Plan:
    """Return the plan in `storage`, without reading the source."""
    units = planned_units(storage)
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


def units_of_keys(storage: Storage, planned: Plan, keys: Iterable[str]) -> set[PlannedUnit]:
    """Return the units that hold a key, or would if it is not planned: one unit of each batch, by the first keys."""
    wanted, found = sorted(keys), set[PlannedUnit]()
    for _, own in itertools.groupby(planned.units if wanted else [], lambda unit: unit.batch):
        units = list(own)
        counts, batch = [unit.rows for unit in units], units[0].batch
        first = storage.read_json(batch_name(batch), "").get("first")
        if first is None:  # planned before first keys were written down
            first = UnitKeys.of(storage.read(keys_name(batch)), counts).first
        found |= {units[max(bisect.bisect_right(first, key) - 1, 0)] for key in wanted}
    return found


def plan(recipe: Recipe, storage: Storage, *, progress: bool = True, rows: SourceReader | None = None) -> Plan:
    """Add a batch for the source's rows that no batch holds yet; return the whole plan.

    `rows` are the source's, if they are not those of images. Raises RecipeError for a source that cannot be read.
    """
    rows = rows or SourceReader(recipe)
    seen = _read_source(storage)
    if seen.get("signature") == rows.signature:
        return _warned(read_plan(storage))
    before = read_plan(storage)
    batch = max((unit.batch for unit in before.units), default=-1) + 1
    files = rows.files()
    earlier = _counts_of(seen)
    planned, exact = _planned_files(earlier, before, files)
    parts = rows.parts(planned)
    with scratch() as folder:
        if parts is not None and on_workers(parts):
            new = BatchOnWorkers(recipe, storage, rows, parts, batch).plan(folder, progress=progress)
        else:
            discard(storage)  # its jobs count on tables that are written over here
            new = _plan_here(recipe, storage, rows, parts, before.units, batch, folder, progress)
    counts = None
    if files is not None and parts is not None:
        counts = {file: earlier[file] for file in planned}
        counts |= {part.id: count for part, count in zip(parts, new.files, strict=True)}
    made = Plan(before.units + new.units, new.read, new.repeats, new.captions, new.unused)
    if planned and exact:
        made = _added(before, made, new.units)
    elif planned and counts is not None:
        made = _with_unread(made, [counts[file] or [0, 0, {}] for file in planned])
    delete_others(storage, batch, new.units)
    if new.units:
        write_facts(storage, batch, new.keys, new.keys_sha256)
    discard(storage)
    sums = {"read": made.read, "repeats": made.repeats, "captions": made.captions, "unused": made.unused}
    record = {"signature": rows.signature, **sums, "files": counts}
    storage.write(_SOURCE, json.dumps(record).encode())
    return _warned(made)


def _plan_here(
    recipe: Recipe,
    storage: Storage,
    rows: SourceReader,
    parts: list[SourcePart] | None,
    before: list[PlannedUnit],
    batch: int,
    folder: Path,
    progress: bool,
) -> NewBatch:
    """Plan a batch in this process, on its disk."""
    unwanted, new = blocked(recipe, storage), NewBatch()
    with Progress("plan", None, unit="rows", enabled=progress) as bar:
        sort = ExternalKeySort(folder)
        for table in rows.tables() if parts is None else _counted(new, rows, parts):
            new.captions += captions_in(table)
            sort.add(unwanted.without(table))
            bar.advance(len(table))
        _write_batch(new, cut(sort.sorted(known(storage, before)), recipe.unit.rows), batch, storage, folder)
    new.read, new.repeats, new.unused = sort.rows, sort.repeats, dict(rows.unused)
    return new


def _counted(new: NewBatch, rows: SourceReader, parts: list[SourcePart]) -> Iterator[pa.Table]:
    """Yield the rows of the files, and count those of each."""
    for part in parts:
        with counted(rows.reader, new.files) as count:
            for table in rows.reader.tables(part.kind, part.file):
                count(table)
                yield table
    rows.note_unused({})


def _write_batch(new: NewBatch, tables: Iterable[pa.Table], batch: int, storage: Storage, folder: Path) -> None:
    """Write the units, then their keys."""
    whole, digest = folder / "keys.bin", hashlib.sha256()
    units = ((PlannedUnit(batch, number, len(table)), table) for number, table in enumerate(tables))
    with whole.open("wb") as file:
        for keys in write_units(units, storage):
            new.keys.add(keys)
            file.write(keys)
            digest.update(keys)
    new.units = [PlannedUnit(batch, number, rows) for number, rows in enumerate(new.keys.counts)]
    new.keys_sha256 = digest.hexdigest()
    if new.units:
        storage.put(whole, keys_name(batch))


def _counts_of(seen: Mapping[str, Any]) -> dict[str, FileCounts | None]:
    """Return the counts of each file of the source as planned last; None if an older version did not note them."""
    files = seen.get("files") or {}
    return files if isinstance(files, dict) else dict.fromkeys(files)


def _planned_files(
    earlier: Mapping[str, FileCounts | None], before: Plan, files: list[str] | None
) -> tuple[frozenset[str], bool]:
    """Return the files whose rows are all in earlier batches, and whether repeats can still be counted.

    If files were added and none was changed or removed, repeats are counted, provided that the batches hold no other
    rows than the source as it was: a row of a new file that they have repeats one of it. After any other change of a
    large source only what changed is read, and repeats are not counted; of another source all is read.
    """
    exact = None not in (before.captions, before.repeats) and before.rows == before.read - (before.repeats or 0)
    if files is not None and exact and earlier.keys() <= set(files):
        return frozenset(earlier), True
    unchanged = frozenset(file for file in files or () if earlier.get(file) is not None)
    return (unchanged, False) if unchanged and is_large(before.read) else (frozenset(), True)


def _with_unread(new: Plan, unread: list[FileCounts]) -> Plan:
    """Return the plan of a source that has the files of the plan `new`, and others with these counts."""
    unused = sum((Counter(each) for _, _, each in unread), Counter(new.unused))
    rows, captions = (sum(counts[of] for counts in unread) for of in (0, 1))
    return Plan(new.units, new.read + rows, None, (new.captions or 0) + captions, dict(unused))


def _added(before: Plan, new: Plan, units: list[PlannedUnit]) -> Plan:
    """Return the plan of a source to which the files of the plan `new` were added, with the fresh rows in `units`."""
    repeats = new.read - sum(unit.rows for unit in units)
    unused = Counter(before.unused) + Counter(new.unused)
    if before.unused.get(OUTSIDE):  # of all files, whether they are new
        unused[OUTSIDE] -= before.unused[OUTSIDE]
    captions = (before.captions or 0) + (new.captions or 0)
    return Plan(new.units, before.read + new.read, (before.repeats or 0) + repeats, captions, dict(+unused))


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
            read, captions = read + len(table), captions + captions_in(table)
            if read >= most:
                break
    return Plan([], read, 0, captions, dict(rows.unused))
