"""An index of a large dataset's rows in the user's cache, and the sample that answers until it is there

    <cache>/capstan/rows/<sum>-<version>.duckdb      the ledger's short columns: numbers, outcome, reason, unit, shard;
                                                     and `place`, the row's number in its unit's file

It is named by a sum of the sealed manifest, so it belongs to one state of one dataset, and is never out of date.
Losing it costs the time to build it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Self

import duckdb
import numpy as np
import platformdirs
import pyarrow as pa

from capstan.pipeline.dataset.shards import MANIFEST
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.report.query import PLACE, SAMPLE, SHORT, Rows
from capstan.pipeline.report.thresholds import named_columns
from capstan.pipeline.sql import lock
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch

log = logging.getLogger(__name__)

VERSION: Final = 2
KEPT: Final = 4  # indexes of datasets that were looked at last; older ones are removed
_TEXTS: Final = ("key", "outcome", "reason", "unit", "shard")  # texts that are short; all others are left out
_MEMORY_LIMIT: Final = "1200MB"
_BATCH: Final = re.compile(r"(\d{4})-\d{6}")


class SampledRows(Rows):
    """About SAMPLE rows of a finished dataset: the first unit files of each batch.

    Keys are hashes and a unit is a range of keys, so these are rows taken at random.
    """

    def _table(self) -> tuple[str, pa.Schema, list[str]]:
        view, schema, names = super()._table()
        return view, schema, first_files(names, SAMPLE / max(super().count, 1))

    @property
    def count(self) -> int:
        return sum(self.outcomes.values())

    @property
    def sampled(self) -> bool:
        return False


class IndexedRows(Rows):
    """All rows of a dataset, with the columns of its index only."""

    placed = (PLACE, *SHORT)

    def __init__(self, storage: Storage, file: Path) -> None:
        super().__init__(storage)
        self._file = file

    def __enter__(self) -> Self:
        self._scratch = scratch()
        self._scratch.__enter__()
        self.db = duckdb.connect(config={"memory_limit": _MEMORY_LIMIT, "python_enable_replacements": False})
        self.db.execute("SET enable_progress_bar = false")
        self.db.execute(f"ATTACH '{_escaped(self._file)}' AS kept (READ_ONLY)")
        self.db.execute("CREATE VIEW rows AS SELECT * FROM kept.indexed")
        self.db.execute("SET enable_external_access = false")  # what is attached stays readable
        lock(self.db)
        return self

    @property
    def sampled(self) -> bool:
        return False


class RowIndex:
    """Builds the index of one dataset and opens it. `close` interrupts what still runs."""

    def __init__(self, storage: Storage, folder: Path | None = None) -> None:
        self._storage = storage
        self._folder = folder or platformdirs.user_cache_path("capstan") / "rows"
        name = hashlib.sha256(storage.read(MANIFEST)).hexdigest()[:32]
        self.file = self._folder / f"{name}-{VERSION}.duckdb"
        self._db: duckdb.DuckDBPyConnection | None = None
        self._lock = threading.Lock()
        self._closed = False

    def open(self) -> IndexedRows | None:
        """Return the index, open; None if it is not there. One that cannot be read is removed."""
        if not self.file.exists():
            return None
        rows = IndexedRows(self._storage, self.file)
        try:
            rows.__enter__()
            rows.query("SELECT key, outcome, reason, unit FROM rows LIMIT 1")
            os.utime(self.file)
        except (duckdb.Error, OSError) as error:
            log.warning("%s cannot be read and is built again: %s", self.file, error)
            self.file.unlink(missing_ok=True)
            return None
        return rows

    def build(self) -> None:
        """Build the index unless it is there. Raises duckdb.Error or OSError if that fails or was interrupted."""
        if self.file.exists():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f".partial-{os.getpid()}-{uuid.uuid4().hex}")
        try:
            with scratch() as folder, Rows(self._storage) as rows:
                self._fill(partial, rows, folder)
            partial.replace(self.file)
        finally:
            partial.unlink(missing_ok=True)
            partial.with_name(f"{partial.name}.wal").unlink(missing_ok=True)
        self._forget_old()

    def _fill(self, file: Path, rows: Rows, folder: Path) -> None:
        texts = {name for name, kind in rows.columns.items() if not _is_short(kind)}
        names = [name for name in rows.columns if name not in texts or name in _TEXTS]
        limits: dict[str, Any] = {"memory_limit": _MEMORY_LIMIT, "temp_directory": str(folder)}
        with self._lock:
            if self._closed:
                raise InterruptedError("the viewer has ended")
            self._db = duckdb.connect(str(file), config={**limits, "python_enable_replacements": False})
        try:
            self._db.execute("SET enable_progress_bar = false")
            self._db.register("table", _numbered(rows, names))
            self._db.execute('CREATE TABLE indexed AS SELECT * FROM "table"')
            self._db.unregister("table")
        finally:
            with self._lock:
                self._db.close()
                self._db = None

    def _forget_old(self) -> None:
        """Remove all but the indexes that were used last, and what killed builders left."""
        with contextlib.suppress(OSError):
            files = sorted(self._folder.glob("*.duckdb"), key=lambda file: -file.stat().st_mtime)
            for file in files[KEPT:]:
                file.unlink(missing_ok=True)
            for file in self._folder.glob(".partial-*"):
                owner = file.name.split("-")[1]
                if owner.isdecimal() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
                    file.unlink(missing_ok=True)

    def close(self) -> None:
        """Interrupt a build that runs."""
        with self._lock:
            self._closed = True
            if self._db is not None:
                self._db.interrupt()


def _numbered(rows: Rows, names: Sequence[str]) -> pa.RecordBatchReader:
    """Return columns of all rows in the order of the ledger's files, with each row's place in its file."""
    fields = [field for field in rows.fields if field.name in names]
    schema = pa.schema([*fields, pa.field(PLACE, pa.uint32())])

    def read(unit: str) -> pa.Table:
        table = rows.unit_table(unit, fields)
        return table.append_column(schema.field(PLACE), pa.array(np.arange(len(table), dtype=np.uint32)))

    batches = (batch for table in ahead(read, rows.units) for batch in table.to_batches())
    return pa.RecordBatchReader.from_batches(schema, batches)


def first_files(names: Iterable[str], share: float) -> list[str]:
    """Return the first files of each batch, by name, that hold about this share of the rows; at least one of each.

    >>> first_files([f"ledger/unit-000{b}-00000{n}.parquet" for b in range(2) for n in range(4)], 0.5)[1:3]
    ['ledger/unit-0000-000001.parquet', 'ledger/unit-0001-000000.parquet']
    """
    batches: dict[str, list[str]] = {}
    for name in sorted(names):
        found = _BATCH.search(name)
        batches.setdefault(found[1] if found else name, []).append(name)
    return [name for files in batches.values() for name in files[: max(1, round(len(files) * share))]]


def covers(rows: Rows, *conditions: str) -> bool:
    """Return whether rows have all columns that SQL conditions name."""
    known = {name.casefold() for name in rows.columns}
    return all(named_columns(rows.db, text) <= known for text in conditions if text)


def _is_short(kind: str) -> bool:
    return not kind.startswith(("VARCHAR", "BLOB", "STRUCT", "MAP")) and "[" not in kind


def _escaped(file: Path) -> str:
    return str(file).replace("'", "''")
