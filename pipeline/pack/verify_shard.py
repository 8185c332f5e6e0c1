"""One file or shard of a dataset → what is wrong with it: every byte is hashed, every tar is walked

A tar's bytes follow from its table, except for the images. So each header, caption, JSON and gap is compared, and
differences are named.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator
from typing import BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from capstan.pipeline.dataset import energon
from capstan.pipeline.dataset.parts import PARTS, is_part, parts_in
from capstan.pipeline.dataset.shards import BLOCK, MANIFEST, ShardEntry, sha256_of, tar_end, tar_header, to_json
from capstan.pipeline.pack.job import sample_fields
from capstan.pipeline.records import CRC32
from capstan.pipeline.storage import Storage

_READ_BYTES: Final = 4 << 20
_JPEG: Final = b"\xff\xd8"  # the first bytes of every JPEG
_HEAD: Final = 16  # bytes by which other files are known


def check_shard(storage: Storage, entry: ShardEntry, schema: pa.Schema) -> tuple[pa.ChunkedArray, list[str]]:
    """Return the keys in a shard's table, and its problems, one line each that names the file."""
    table, problems = check_table(storage, entry.table, entry.table_sha256, schema)
    if table is not None:
        if len(table) != entry.samples:
            problems.append(f"{entry.table}: {len(table)} rows, {MANIFEST} says {entry.samples}")
        if not storage.exists(entry.index):
            problems.append(f"{entry.index}: missing")
        elif storage.read(entry.index) != energon.tar_index(table):
            problems.append(f"{entry.index}: does not match {entry.table}")
    keys = table["key"] if table else pa.chunked_array([], pa.string())
    if not storage.exists(entry.tar):
        return keys, [*problems, f"{entry.tar}: missing"]
    with contextlib.closing(storage.open(entry.tar)) as file:
        stream = _Hashed(file)
        if table is not None:
            problems += [f"{entry.tar}: {problem}" for problem in _differences(stream, table)]
        stream.finish()
    if stream.size != entry.bytes:
        problems.append(f"{entry.tar}: {stream.size} bytes, {MANIFEST} says {entry.bytes}")
    elif stream.sha256 != entry.sha256:
        problems.append(f"{entry.tar}: its SHA-256 is not the one in {MANIFEST}")
    return keys, problems


def check_table(storage: Storage, name: str, sha256: str, schema: pa.Schema) -> tuple[pa.Table | None, list[str]]:
    """Return a Parquet file (None if it is missing, damaged or has another schema) and its problems."""
    if not storage.exists(name):
        return None, [f"{name}: missing"]
    data = storage.read(name)
    if sha256_of(data) != sha256:
        return None, [f"{name}: its SHA-256 is not the one in {MANIFEST}"]
    try:
        table = pq.ParquetFile(io.BytesIO(data)).read()
    except (pa.ArrowException, OSError) as error:
        return None, [f"{name}: cannot be read as Parquet: {error}"]
    if table.schema not in (schema, pa.schema([field for field in schema if field != CRC32])):  # checksums came later
        return None, [f"{name}: its columns are not those that this version writes"]
    return table, []


def file_sha256(storage: Storage, name: str) -> str | None:
    """Return the SHA-256 of a file; None if there is none."""
    try:
        file = storage.open(name)
    except FileNotFoundError:
        return None
    with contextlib.closing(file):
        stream = _Hashed(file)
        stream.finish()
    return stream.sha256


class _Hashed:
    """A file that is read once from its start, and hashed and measured on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0
        self._block, self._at = b"", 0

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer only at the end of the file."""
        while len(self._block) - self._at < size and self._fill():
            pass
        start, self._at = self._at, min(self._at + size, len(self._block))
        return self._block[start : self._at]

    def drop(self, size: int) -> int:
        """Skip the next `size` bytes; return the number skipped, fewer only at the end of the file."""
        left = size
        while left:
            step = min(left, len(self._block) - self._at)
            self._at, left = self._at + step, left - step
            if left and not self._fill():
                break
        return size - left

    def finish(self) -> None:
        """Read the rest of the file."""
        self._at = len(self._block)
        while self._fill():
            self._at = len(self._block)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _fill(self) -> bool:
        data = self._file.read(_READ_BYTES)
        self._digest.update(data)
        self.size += len(data)
        self._block, self._at = self._block[self._at :] + data, 0
        return bool(data)


def _differences(tar: _Hashed, table: pa.Table) -> Iterator[str]:
    """Yield the differences between a tar and the shard's table. Stops at the first member that is out of place."""
    position = 0
    for row in table.to_pylist():
        if row["offset"] != position + BLOCK:
            yield f"{row['key']}.jpg is at {position + BLOCK}, the table says {row['offset']}"
            return
        fields, caption = to_json(sample_fields(row)), row["caption"].encode()
        parts = [(part, row[f"{part}_size"], None) for part in parts_in(row) if row[f"{part}_size"]]
        if len(fields) != row["json_size"]:
            yield f"{row['key']}.json has {len(fields)} bytes, the table says {row['json_size']}"
            return
        for suffix, size, expected in (
            ("jpg", row["size"], None),
            *parts,
            ("json", len(fields), fields),
            ("txt", len(caption), caption),
        ):
            name, gap = f"{row['key']}.{suffix}", -size % BLOCK
            header = tar.take(BLOCK)
            if header != tar_header(name, size):
                yield _strange(header, name)
                if header[:100].rstrip(b"\0") != name.encode():
                    return
            if suffix in PARTS and row[f"{suffix}_offset"] != position + BLOCK:
                yield f"{name} is at {position + BLOCK}, the table says {row[f'{suffix}_offset']}"
            head = len(_JPEG) if suffix == "jpg" else min(size, _HEAD)
            data = tar.take(size if expected is not None else min(size, head))
            present = len(data) + tar.drop(size - len(data))
            padding = tar.take(gap)
            if present + len(padding) < size + gap:
                yield f"ends within {name}"
                return
            if suffix in PARTS:
                if not is_part(suffix, data):
                    yield f"{name} is not a file of this kind"
            elif data != (_JPEG if expected is None else expected):
                yield f"{name} {'is not a JPEG' if expected is None else 'does not match the table'}"
            if padding.strip(b"\0"):
                yield f"{name} is not followed by zeros"
            position += BLOCK + size + gap
    if tar.take(len(tar_end(position)) + 1) != tar_end(position):
        yield "does not end after the table's last sample, or lacks a tar's end marker"


def _strange(header: bytes, name: str) -> str:
    """Return the problem with the header of the member that should be `name`."""
    if len(header) < BLOCK:
        return f"{name} is missing (found the end of the file)"
    found = header[:100].rstrip(b"\0").decode("ascii", "replace")
    if found == name:
        return f"{name} has a damaged header, or its size differs from the table"
    return f"{name} is missing (found {found or 'the end of the tar'})"
