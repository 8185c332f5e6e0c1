"""A dataset → what is wrong with it: every tar reopened, every sum, member, offset, index and count checked."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RecipeError
from pipeline.pack import indexes, unlisted
from pipeline.records import KEPT, LEDGER_SCHEMA, SHARD_SCHEMA
from pipeline.shards import Manifest, ShardEntry, read_manifest, sha256_of
from pipeline.storage import Storage

log = logging.getLogger(__name__)


def verify(storage: Storage) -> list[str]:
    """Every problem of the dataset at `storage`, each in a line that names the file; none if all is well.

    Raises RecipeError where there is no dataset.
    """
    manifest = read_manifest(storage)
    if manifest is None:
        raise RecipeError(storage.field, f"no dataset at {storage.url}", "name a folder that holds a dataset.json")
    problems = [] if manifest.complete else ["dataset.json: incomplete: run `capstan build` again"]
    shard_of: dict[str, str] = {}
    for entry in manifest.shards:
        keys, found = _shard(storage, entry)
        problems += found
        for key in keys:
            if key in shard_of:
                problems.append(f"{entry.table}: key {key} is in {shard_of[key]} too")
            shard_of[key] = entry.name
    if manifest.complete:
        problems += _ledger(storage, manifest, shard_of)
        problems += _indexes(storage, manifest)
        problems += [f"{name}: not listed in dataset.json" for name in unlisted(storage, manifest)]
    return problems


def _shard(storage: Storage, entry: ShardEntry) -> tuple[list[str], list[str]]:
    """The keys in the shard's table, and what is wrong with the shard."""
    table, problems = _table(storage, entry.table, entry.table_sha256, SHARD_SCHEMA)
    if table is None:
        return [], problems
    if len(table) != entry.samples:
        problems.append(f"{entry.table}: {len(table)} rows, dataset.json says {entry.samples}")
    if not storage.exists(entry.tar):
        return table["key"].to_pylist(), [*problems, f"{entry.tar}: missing"]
    digest = hashlib.sha256()
    with contextlib.closing(storage.open(entry.tar)) as file:
        stream = _Hashed(file, digest)
        problems += [f"{entry.tar}: {problem}" for problem in _members(stream, table)]
        while stream.read(1 << 20):
            pass  # what lies behind the tar's end counts too
    if stream.size != entry.bytes:
        problems.append(f"{entry.tar}: {stream.size} bytes, dataset.json says {entry.bytes}")
    elif digest.hexdigest() != entry.sha256:
        problems.append(f"{entry.tar}: its SHA-256 is not the one in dataset.json")
    return table["key"].to_pylist(), problems


class _Hashed(io.RawIOBase):
    """A forward-only stream that is hashed and measured as it is read."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest, self.size = file, digest, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self.size += len(data)
        return data


def _members(stream: _Hashed, table: pa.Table) -> Iterator[str]:
    """Compares a tar's members with the shard's table: KEY.jpg KEY.json KEY.txt for each row, where the table says."""
    rows = table.select(["key", "caption", "offset", "size"]).to_pylist()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            members = iter(tar)
            for row in rows:
                for suffix in ("jpg", "json", "txt"):
                    member, wanted = next(members, None), f"{row['key']}.{suffix}"
                    if member is None or member.name != wanted:
                        yield f"{wanted} is missing (found {member.name if member else 'the end'})"
                        return
                    if problem := _member(tar, member, suffix, row):
                        yield f"{wanted} {problem}"
            if (extra := next(members, None)) is not None:
                yield f"{extra.name} is not in the table"
    except (tarfile.TarError, EOFError) as error:
        yield f"cannot be read as a tar: {error}"


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, row: dict[str, Any]) -> str:
    """What is wrong with one member, or ""."""
    file = tar.extractfile(member)
    data = file.read() if file else b""
    match suffix:
        case "jpg":
            if (member.offset_data, member.size) != (row["offset"], row["size"]):
                return f"lies at {member.offset_data}+{member.size}, the table says {row['offset']}+{row['size']}"
            if not data.startswith(b"\xff\xd8"):
                return "is not a JPEG"
        case "json":
            try:
                fields = json.loads(data)
            except ValueError:
                return "is not JSON"
            if fields.get("key") != row["key"]:
                return "names another key"
        case "txt" if data.decode("utf-8", "replace") != row["caption"]:
            return "is not the table's caption"
    return ""


def _ledger(storage: Storage, manifest: Manifest, shard_of: dict[str, str]) -> list[str]:
    """The ledger's tables, its counts, and that it and the shards tell the same."""
    problems: list[str] = []
    outcomes = Counter[str]()
    kept: dict[str, str] = {}
    for entry in manifest.ledger:
        table, found = _table(storage, entry.table, entry.sha256, LEDGER_SCHEMA)
        problems += found
        if table is None:
            continue
        if len(table) != entry.rows:
            problems.append(f"{entry.table}: {len(table)} rows, dataset.json says {entry.rows}")
        for key, outcome, shard in zip(*(table[name].to_pylist() for name in ("key", "outcome", "shard")), strict=True):
            outcomes[outcome] += 1
            if outcome == KEPT:
                kept[key] = shard
    if not problems:
        for outcome, count in manifest.counts.items():
            if outcome in ("kept", "rejected", "duplicate", "failed") and outcomes[outcome] != count:
                problems.append(f"ledger: {outcomes[outcome]} rows {outcome}, dataset.json says {count}")
        if kept != shard_of:
            wrong = sorted(key for key in kept.keys() | shard_of.keys() if kept.get(key) != shard_of.get(key))
            problems.append(f"ledger: {len(wrong)} keys are not in the shard it names, e.g. {wrong[0]}")
    return problems


def _indexes(storage: Storage, manifest: Manifest) -> list[str]:
    problems = []
    for name, data in indexes(manifest).items():
        if not storage.exists(name):
            problems.append(f"{name}: missing")
        elif storage.read(name) != data:
            problems.append(f"{name}: does not agree with dataset.json")
    return problems


def _table(storage: Storage, name: str, sha256: str, schema: pa.Schema) -> tuple[pa.Table | None, list[str]]:
    """A Parquet file if it is there and has the schema; and what is wrong with it."""
    if not storage.exists(name):
        return None, [f"{name}: missing"]
    data = storage.read(name)
    problems = [] if sha256_of(data) == sha256 else [f"{name}: its SHA-256 is not the one in dataset.json"]
    try:
        table = pq.ParquetFile(io.BytesIO(data)).read()
    except (pa.ArrowException, OSError) as error:
        return None, [*problems, f"{name}: cannot be read as Parquet: {error}"]
    if table.schema != schema:
        return None, [*problems, f"{name}: has other columns than this version writes"]
    return table, problems
