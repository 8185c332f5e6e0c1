"""A large source → a new batch of the plan, on the unit map's workers

    read     source files → runs: rows in slices, the first bits of their keys (planning/runs.py)
    keys     slices → the keys that no batch has, sorted, each once
    units    ranges of these → the tables of the plan's units

    state/planning/<hash>/    what the steps leave for each other, and their markers; removed once the batch is planned

The hash is of all that the batch depends on, so an interrupted plan resumes where it stopped, and what another left is
not used. The driver sees numbers only, and the keys on their way into one file.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.errors import Quarantined, RecipeError
from capstan.pipeline.source.blocklist import blocked
from capstan.pipeline.source.columns import captions_in
from capstan.pipeline.source.planning.batches import FileCounts, NewBatch, PlannedUnit, keys_name
from capstan.pipeline.source.planning.jobs import KEYS, SIZES, CountKeys, WriteUnits
from capstan.pipeline.source.planning.runs import RunWriter, write_index
from capstan.pipeline.source.planning.unit_tables import Sizes, unit_rows
from capstan.pipeline.source.reader import FileReader, SourcePart, SourceReader
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.listing import SourceFile
from capstan.pipeline.units import Job, Piece, Unit, report, run

log = logging.getLogger(__name__)

SMALL_ROWS: Final = 2_000_000  # of a source, counted as in SourcePart: no more are planned in one process
_READ_ROWS: Final = 500_000  # of the files of a unit of the first job,
_KEYS_AT_ONCE: Final = 1_000_000  # of one of the second,
_GROUP_BYTES: Final = 48 << 20  # of rows in memory of the third, and of the second if there are images
_MANY_ROWS: Final = 50_000_000  # from here on more and smaller slices
_FOLDER: Final = "state/planning"
_VERSION: Final = 2  # of what the steps leave for each other


def is_large(rows: int) -> bool:
    """Return whether a source of so many rows is planned with as little work as possible, by several processes."""
    return rows > SMALL_ROWS


def on_workers(parts: Sequence[SourcePart] | None) -> bool:
    """Return whether files of a source are planned on workers: several, with more than SMALL_ROWS rows in all."""
    return parts is not None and len(parts) > 1 and is_large(sum(part.rows for part in parts))


class ReadFiles(Job):
    """The job that reads source files. A unit is some neighbouring ones."""

    name, title = "plan-read", "plan: read"

    def __init__(self, scratch: Storage, dataset: Storage, reader: FileReader, recipe: Recipe, bits: int) -> None:
        self.storage, self.dataset, self.recipe, self.bits = scratch, dataset, recipe, bits
        self.suffixes = reader.suffixes

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Write the rows as runs; yield their counts, and the warnings about them."""
        reader, runs = FileReader(self.recipe, self.suffixes), RunWriter(self.storage, unit.id, self.bits)
        unwanted = blocked(self.recipe, self.dataset)
        files, images = list[FileCounts](), 0
        with _noted_warnings() as warnings:
            for kind, *fields in unit.spec["files"]:
                with counted(reader, files) as count:
                    for table in reader.tables(kind, SourceFile(*fields)):
                        count(table)
                        images += len(table) - table["image"].null_count
                        runs.add(unwanted.without(table))
                        report({"samples": len(table)})
        runs.flush()
        counts = {"read": sum(rows for rows, *_ in files), "images": images, "nbytes": runs.nbytes}
        yield counts | {"files": files, "runs": runs.names, "warnings": warnings}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts


@contextlib.contextmanager
def counted(reader: FileReader, files: list[FileCounts]) -> Iterator[Callable[[pa.Table], None]]:
    """Append the counts of the file that is read meanwhile to `files`; yield what counts its rows."""
    before, counts = Counter(reader.unused), [0, 0]

    def count(rows: pa.Table) -> None:
        counts[0] += len(rows)
        counts[1] += captions_in(rows)

    yield count
    files.append([*counts, dict(reader.unused - before)])


class _Noted(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def _noted_warnings() -> Iterator[list[str]]:
    """Return the warnings about the source from now on: what a worker logs, nobody sees."""
    logger, noted = logging.getLogger("capstan.pipeline.source"), _Noted()
    logger.addHandler(noted)
    try:
        yield noted.texts
    finally:
        logger.removeHandler(noted)


def discard(storage: Storage) -> None:
    """Remove what interrupted plans have left, which holds rows."""
    storage.delete(*storage.names(_FOLDER))


class BatchOnWorkers:
    """One batch that is planned on workers."""

    def __init__(
        self, recipe: Recipe, storage: Storage, rows: SourceReader, parts: Sequence[SourcePart], batch: int
    ) -> None:
        self._recipe, self._storage, self._rows, self._batch = recipe, storage, rows, batch
        self._bits = 10 if sum(part.rows for part in parts) <= _MANY_ROWS else 12
        self._files = list(_read_units(parts))
        settings = [rows.signature, recipe.image.check, blocked(recipe, storage).digest, recipe.unit.rows]
        files = [unit.spec["files"] for unit in self._files]
        self._name = f"{_FOLDER}/{fingerprint([_VERSION, settings, sorted(rows.reader.suffixes), batch, files])}"
        self._between = storage.folder(self._name)

    def plan(self, scratch: Path, *, progress: bool) -> NewBatch:
        """Write the batch's units and keys; `scratch` is a folder of this machine.

        Raises RecipeError for a file that cannot be read, Quarantined if workers kept failing.
        """
        self._storage.delete(*(n for n in self._storage.names(_FOLDER) if not n.startswith(f"{self._name}/")))
        reading = ReadFiles(self._between, self._storage, self._rows.reader, self._recipe, self._bits)
        try:
            read = self._run(reading, self._files, progress)
        except RecipeError:
            discard(self._storage)
            raise
        made = self._counted(read)
        runs = [name for facts in read for name in facts["runs"]]
        images, nbytes = any(facts["images"] for facts in read), sum(facts["nbytes"] for facts in read)
        at_once = max(1, _GROUP_BYTES * made.read // max(1, nbytes))  # rows
        job = CountKeys(self._between, self._storage, runs, self._bits)
        slices = list(_key_units(write_index(self._between, runs, self._bits), images, at_once))
        found = self._run(job, slices, progress)
        made.repeats = sum(facts["repeats"] for facts in found)
        keys = [(unit.id, facts["rows"]) for unit, facts in zip(slices, found, strict=True)]
        counts = list(unit_rows(self._lengths(keys, images), self._recipe.unit.rows))
        made.units = [PlannedUnit(self._batch, number, rows) for number, rows in enumerate(counts)]
        self._run_units(made, keys, runs, at_once, progress)
        self._write_keys(made, [name for name, _ in keys], scratch)
        return made

    def _run(self, job: Job, units: Sequence[Unit], progress: bool) -> list[dict[str, Any]]:
        """Do what is left of the units; return what is known of each."""
        summary = run(job, units, self._recipe.resources, progress=progress)
        if summary.quarantined:
            raise Quarantined(job.title, summary.quarantined)
        facts = job.markers.read()
        return [facts[unit.id] for unit in units]

    def _counted(self, read: Sequence[dict[str, Any]]) -> NewBatch:
        """Return the counts of all files together; log what workers said of them."""
        made = NewBatch(files=[counts for facts in read for counts in facts["files"]])
        for _, _, unused in made.files:
            self._rows.note_unused(unused)
        for text in (text for facts in read for text in facts["warnings"]):
            log.warning("%s", text)
        made.read, made.captions = (sum(counts[of] for counts in made.files) for of in (0, 1))
        made.unused = dict(self._rows.unused)
        return made

    def _lengths(self, keys: Sequence[tuple[str, int]], images: bool) -> Iterator[Sizes | int]:
        """Yield the sizes of the embedded images of each range of keys; without images, only its number of rows."""
        for name, rows in keys:
            yield np.frombuffer(self._between.read(f"{SIZES}/{name}"), np.int64) if images else rows

    def _run_units(
        self, made: NewBatch, keys: Sequence[tuple[str, int]], runs: list[str], at_once: int, progress: bool
    ) -> None:
        job = WriteUnits(self._between, self._storage, runs, self._bits)
        for facts in self._run(job, list(_unit_units(made.units, keys, at_once)), progress):
            made.keys.first.extend(facts["first"])
            made.keys.crc32.extend(facts["crc32"])
        made.keys.counts.extend(unit.rows for unit in made.units)

    def _write_keys(self, made: NewBatch, names: Sequence[str], scratch: Path) -> None:
        """Publish the keys of all ranges as one file."""
        digest, whole = hashlib.sha256(), scratch / "keys.bin"
        with whole.open("wb") as file:
            for name in names:
                data = self._between.read(f"{KEYS}/{name}")
                digest.update(data)
                file.write(data)
        made.keys_sha256 = digest.hexdigest()
        if made.units:
            self._storage.put(whole, keys_name(self._batch))


def _read_units(parts: Sequence[SourcePart]) -> Iterator[Unit]:
    """Yield the units of the first job: neighbouring files with about _READ_ROWS rows."""
    files, rows, number = list[list[Any]](), 0, 0
    for place, part in enumerate(parts):
        files.append([part.kind, *astuple(part.file)])
        rows += part.rows
        if rows >= _READ_ROWS or place == len(parts) - 1:
            yield Unit(f"{number:06d}", {"files": files, "rows": rows})
            files, rows, number = [], 0, number + 1


def _key_units(rows: Sizes, images: bool, at_once: int) -> Iterator[Unit]:
    """Yield the units of the second job: neighbouring slices, of which `rows` are the numbers of rows."""
    most = at_once if images else _KEYS_AT_ONCE
    first = held = 0
    for number, more in enumerate([*rows.tolist(), most]):
        if number > first and held + more > most:
            yield Unit(f"{first:06d}", {"slices": [first, number], "images": images, "rows": held})
            first, held = number, 0
        held += more


def _unit_units(units: Sequence[PlannedUnit], keys: Sequence[tuple[str, int]], at_once: int) -> Iterator[Unit]:
    """Yield the units of the third job: neighbouring units with about `at_once` rows, and where their keys are."""
    held = list[PlannedUnit]()
    places = _Places(keys)
    for unit in units:
        held.append(unit)
        rows = sum(one.rows for one in held)
        if rows + unit.rows > at_once or unit is units[-1]:
            spec = {"batch": unit.batch, "first": held[0].number, "counts": [one.rows for one in held], "rows": rows}
            yield Unit(f"{held[0].number:06d}", spec | {"keys": places.next(rows)})
            held = []


class _Places:
    """Hands out keys in order: files of them, of each the number of keys."""

    def __init__(self, keys: Sequence[tuple[str, int]]) -> None:
        self._keys, self._at, self._start = keys, 0, 0

    def next(self, count: int) -> list[list[Any]]:
        """Return where the next `count` keys are: [file, first, stop]."""
        places = list[list[Any]]()
        while count:
            name, there = self._keys[self._at]
            taken = min(count, there - self._start)
            if taken:
                places.append([name, self._start, self._start + taken])
            count, self._start = count - taken, self._start + taken
            if self._start == there:
                self._at, self._start = self._at + 1, 0
        return places
