"""metadata.csv, .jsonl or .parquet → captions of a folder's images

Hugging Face's ImageFolder: a column `file_name` names each image, relative to the file; other columns describe it. Rows
are kept in a SQLite file, so that memory does not grow with them.
"""

from __future__ import annotations

import json
import posixpath
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from capstan.pipeline.storage.listing import SourceFile

FILE_NAME: Final = "file_name"
_NAMES: Final = frozenset(["metadata.csv", "metadata.jsonl", "metadata.parquet"])


def is_metadata(file: SourceFile) -> bool:
    """Return whether a file next to images describes them, by its name."""
    return not file.named and file.path.rpartition("/")[2] in _NAMES


@dataclass(frozen=True)
class Described:
    """What the metadata holds of an image: its caption, "" if it is empty, and the other columns."""

    caption: str
    fields: dict[str, Any]


class ImageMetadata:
    """The rows of metadata files by the path of their image, in a SQLite file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.rows = self.used = 0
        self._db = sqlite3.connect(folder / "metadata.sqlite", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("CREATE TABLE images (path TEXT PRIMARY KEY, caption TEXT, fields TEXT) WITHOUT ROWID")

    def close(self) -> None:
        self._db.close()

    def add(self, file: SourceFile, tables: Iterable[pa.Table]) -> None:
        """Add the rows of a metadata file: tables of PLAN_SCHEMA whose `url` is the file name."""
        base = file.path.rpartition("/")[0]
        for table in tables:
            names = (f"{base}/{posixpath.normpath(name)}" for name in table["url"].to_pylist())
            rows = zip(names, table["caption"].to_pylist(), table["extra"].to_pylist(), strict=True)
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?)", rows)
            self._db.execute("COMMIT")
            self.rows += len(table)

    def of(self, path: str) -> Described | None:
        """Return what is known of the image at `path`."""
        row = self._db.execute("SELECT caption, fields FROM images WHERE path = ?", (path,)).fetchone()
        if row is None:
            return None
        self.used += 1
        return Described(row[0], json.loads(row[1]))
