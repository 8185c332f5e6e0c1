"""Shard tables → the indexes that Megatron-Energon reads

    shards/NAME.tar.idx       where each sample starts and the last one ends: 64-bit little-endian byte offsets
    .nv-meta/index.sqlite     samples and their parts by key, for random access and joins; on request
    .nv-meta/index.uuid       identifies the content
    .nv-meta/dataset.yaml     how a sample becomes a CaptioningSample
    .nv-meta/split.yaml       all shards are for training
    .nv-meta/.info.json       samples per shard; without it Energon finds no dataset

Offsets are known from the tables, so no tar is opened again. Names and layout are those of Energon 7.4; a test opens a
dataset with its reader and compares with its own indexer.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from capstan.pipeline.dataset.parts import PARTS, part_fields, parts_in
from capstan.pipeline.dataset.shards import BLOCK, Manifest, ShardEntry
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.storage import Storage

FOLDER = ".nv-meta"
INDEX = f"{FOLDER}/index.sqlite"
INFO = f"{FOLDER}/.info.json"
NAMES = (INFO, INDEX, *(f"{FOLDER}/{name}" for name in ("index.uuid", "split.yaml", "dataset.yaml")))
_COLUMNS = ["key", "caption", "offset", "size", "json_size", *(field.name for field in part_fields(PARTS))]
_PAGE_BYTES = 4096
_CACHE_KIB = 16_384
_SQLITE_VERSION = 3_040_001  # written into every index, so that its bytes do not depend on the library version

_TABLES = (
    "CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE,"
    " sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER)",
    "CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT,"
    " content_byte_offset INTEGER, content_byte_size INTEGER)",
)
_INDEXES = (
    "CREATE INDEX idx_samples_by_tar_and_idx ON samples (tar_file_id, sample_index)",
    "CREATE INDEX idx_sample_parts_seq ON sample_parts (tar_file_id, sample_index, content_byte_offset)",
    "CREATE INDEX idx_sample_parts_full ON sample_parts"
    " (tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size)",
)

Numbers = npt.NDArray[np.int64]
Row = tuple[Any, ...]


class Layout(NamedTuple):
    """Byte positions of samples in their tar: first header; offset and size of each file, in order; end.

    A sample without a file has size 0 for it, but for JSON and text.
    """

    start: Numbers
    files: dict[str, tuple[Numbers, Numbers]]
    end: Numbers


def layout(table: pa.Table) -> Layout:
    """Return the positions of the samples of a shard's table."""
    columns = (table["offset"], table["size"], table["json_size"], pc.binary_length(table["caption"]))
    offset, size, json_size, txt_size = (np.asarray(column, dtype=np.int64) for column in columns)
    files, json_offset = {"jpg": (offset, size)}, offset + _padded(size) + BLOCK
    for part in parts_in(table.column_names):
        own, length = (np.asarray(table[f"{part}_{name}"], dtype=np.int64) for name in ("offset", "size"))
        files[part] = (own, length)
        json_offset = json_offset + np.where(length > 0, _padded(length) + BLOCK, 0)
    txt_offset = json_offset + _padded(json_size) + BLOCK
    end = txt_offset + _padded(txt_size)
    files |= {"json": (json_offset, json_size), "txt": (txt_offset, txt_size)}
    return Layout(offset - BLOCK, files, end)


def _padded(size: Numbers) -> Numbers:
    return -(-size // BLOCK) * BLOCK


def tar_index(table: pa.Table) -> bytes:
    """Return the content of shards/NAME.tar.idx for a shard's table."""
    places = layout(table)
    return np.concatenate([places.start, places.end[-1:]]).astype("<u8").tobytes()


def metadata(manifest: Manifest) -> dict[str, bytes]:
    """Return the files of .nv-meta/ except the SQLite index, `.info.json` last.

    Nothing if there is no shard: Energon refuses empty datasets.
    """
    if not manifest.shards:
        return {}
    names = [entry.tar for entry in manifest.shards]
    caption = {
        "sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"},
        "field_map": {"image": "jpg", "caption": "txt"},
    }
    split = {"split_parts": {"train": names, "val": [], "test": []}}
    info = {"shard_counts": {entry.tar: entry.samples for entry in manifest.shards}}
    return {
        f"{FOLDER}/dataset.yaml": yaml.safe_dump(caption, sort_keys=False).encode(),
        f"{FOLDER}/split.yaml": yaml.safe_dump(split, sort_keys=False).encode(),
        f"{FOLDER}/index.uuid": str(_identity(manifest)).encode(),
        INFO: json.dumps(info, indent=1).encode(),
    }


def _identity(manifest: Manifest) -> uuid.UUID:
    """Return an id that changes if, and only if, the content of a shard does."""
    shards = json.dumps([[entry.name, entry.sha256] for entry in manifest.shards])
    return uuid.uuid5(uuid.NAMESPACE_OID, shards)


def write_sqlite(path: Path, storage: Storage, shards: Sequence[ShardEntry]) -> None:
    """Write index.sqlite to the local file `path`; equal shards give equal bytes.

    Rows are processed shard by shard, so memory does not grow with the dataset. SQLite sorts its indexes on disk.
    Raises OSError if the disk is full.
    """
    try:
        _fill(path, storage, shards)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, str(error)) from error
        raise
    with path.open("r+b") as file:
        file.seek(96)  # the library's version in the header
        file.write(_SQLITE_VERSION.to_bytes(4, "big"))


def _fill(path: Path, storage: Storage, shards: Sequence[ShardEntry]) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"page_size={_PAGE_BYTES}"):
            db.execute(f"PRAGMA {pragma}")
        db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        db.execute("BEGIN")
        for statement in _TABLES:
            db.execute(statement)
        for samples, parts in _rows(storage, shards):
            db.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", samples)
            db.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", parts)
        for statement in _INDEXES:
            db.execute(statement)
        db.execute("COMMIT")


def sqlite_agrees(path: Path, storage: Storage, shards: Sequence[ShardEntry]) -> bool:
    """Return whether index.sqlite at the local file `path` agrees with the shards' tables."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as db:
        try:
            samples, parts = (
                db.execute(f"SELECT * FROM {name} ORDER BY rowid") for name in ("samples", "sample_parts")
            )
            for sample_rows, part_rows in _rows(storage, shards):
                for cursor, rows in ((samples, sample_rows), (parts, part_rows)):
                    expected = list(rows)
                    if cursor.fetchmany(len(expected)) != expected:
                        return False
            return samples.fetchone() is None and parts.fetchone() is None
        except sqlite3.Error:
            return False


def _rows(storage: Storage, shards: Sequence[ShardEntry]) -> Iterator[tuple[Iterable[Row], Iterable[Row]]]:
    """Yield the rows of `samples` and of `sample_parts`, one shard at a time."""
    tables = ahead(lambda entry: storage.read_table(entry.table, _COLUMNS), shards)
    for shard, table in enumerate(tables):
        places, rows = layout(table), range(len(table))
        start, length = places.start.tolist(), (places.end - places.start).tolist()
        parts = [(name, offsets.tolist(), sizes.tolist()) for name, (offsets, sizes) in places.files.items()]
        yield (
            zip(itertools.repeat(shard), table["key"].to_pylist(), rows, start, length, strict=False),
            (
                (shard, row, name, offsets[row], sizes[row])
                for row in rows
                for name, offsets, sizes in parts
                if sizes[row] or name not in PARTS
            ),
        )
