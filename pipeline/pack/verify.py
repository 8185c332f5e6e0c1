"""Verification of a dataset: hash every file, walk every tar, compare them all

A tar's bytes follow from its table, except for the images. So each header, caption, JSON and gap is compared, and
differences are named. Shards are prefetched; memory grows by 8 bytes per sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capstan.pipeline.dataset import croissant, energon
from capstan.pipeline.dataset.indexes import indexes
from capstan.pipeline.dataset.parts import PARTS, is_part, part_fields, parts_in
from capstan.pipeline.dataset.shards import (
    BLOCK,
    MANIFEST,
    Manifest,
    ShardEntry,
    read_manifest,
    seal_holds,
    sha256_of,
    tar_end,
    tar_header,
    to_json,
)
from capstan.pipeline.errors import CapstanError, DamagedFile, RecipeError
from capstan.pipeline.ingest.job import Staged, staged
from capstan.pipeline.ingest.staging import may_be_freed
from capstan.pipeline.pack.job import sample_fields, unlisted
from capstan.pipeline.pack.verify_derived import verify_derived
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.progress import Progress
from capstan.pipeline.records import CRC32, FORMAT_VERSION, KEPT, LEDGER_SCHEMA, OUTCOMES, SHARD_SCHEMA, with_scores
from capstan.pipeline.score.store import pinned_columns
from capstan.pipeline.select.derived import fields_of, parts_of_manifest
from capstan.pipeline.source.plan import plan_problems
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units import MarkerLog

log = logging.getLogger(__name__)

_READ_BYTES = 4 << 20

_JPEG = b"\xff\xd8"  # the first bytes of every JPEG
_HEAD = 16  # bytes by which other files are known

Words = npt.NDArray[np.uint32]  # keys as (samples, 4)
Sums = Counter[str]  # shard → sum of its keys, independent of their order


def verify(storage: Storage, *, progress: bool = False) -> list[str]:
    """Return every problem of the dataset at `storage`, one line each that names the file; [] if there is none.

    Raises RecipeError if there is no dataset, or if a newer Capstan wrote it.
    """
    try:
        manifest = read_manifest(storage)
    except RecipeError:
        raise  # a newer Capstan wrote it: no damage
    except CapstanError as error:
        return [f"{MANIFEST}: {error}"]
    if manifest is None:
        raise RecipeError(storage.field, f"no dataset at {storage.url}", "name a folder that holds a dataset.json")
    if manifest.format_version < FORMAT_VERSION:
        return [f"{MANIFEST}: format {manifest.format_version} is too old for this version: run `capstan build` again"]
    problems = [] if manifest.complete else [f"{MANIFEST}: incomplete: run `capstan build` again"]
    problems += [f"{name}: a link, and links inside a dataset are not followed" for name in storage.links()]
    if not seal_holds(storage.read(MANIFEST)):
        problems.append(f"{MANIFEST}: does not match its own seal: damaged, or edited by hand")
    found, keys, sums = _shards(storage, manifest, progress)
    problems += found
    if manifest.complete:
        problems += _twice(storage, manifest, keys)
        if (manifest.recipe.get(croissant.PUBLISHED) or {}).get("ledger", True):  # a copy may be without it
            problems += _ledger(storage, manifest, sums)
        problems += _indexes(storage, manifest, tables_are_whole=sums is not None)
        problems += [f"{name}: not listed in {MANIFEST}" for name in unlisted(storage, manifest)]
        problems += _staged(storage)
    problems += plan_problems(storage)
    problems += verify_derived(storage, manifest)
    return problems


# Shards ----------------------------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """A verified shard: its keys and its problems."""

    keys: Words
    problems: list[str] = field(default_factory=list)


def _shards(
    storage: Storage, manifest: Manifest, progress: bool
) -> tuple[list[str], list[npt.NDArray[np.uint64]], Sums | None]:
    """Return all shards' problems, the first 8 bytes of their keys, and their sums (None if a table is unreadable)."""
    problems: list[str] = []
    firsts: list[npt.NDArray[np.uint64]] = []
    sums: Sums | None = Sums()
    with Progress("verify", len(manifest.shards), unit="shards", enabled=progress) as bar:
        more = [*fields_of(manifest.recipe), *pinned_columns(manifest.scores)]
        schema = with_scores(SHARD_SCHEMA, [*more, *part_fields(parts_of_manifest(manifest.recipe))])
        verified = ahead(lambda entry: _shard(storage, entry, schema), manifest.shards)
        for entry, shard in zip(manifest.shards, verified, strict=True):
            problems += shard.problems
            firsts.append(_first(shard.keys))
            if len(shard.keys) != entry.samples:
                sums = None
            elif sums is not None:
                sums[entry.name] = _sum(shard.keys)
            bar.advance(counts={"samples": entry.samples, "bytes": entry.bytes, "problems": len(shard.problems)})
    return problems, firsts, sums


def _shard(storage: Storage, entry: ShardEntry, schema: pa.Schema) -> _Shard:
    table, problems = _table(storage, entry.table, entry.table_sha256, schema)
    shard = _Shard(_words(table["key"] if table else pa.chunked_array([], pa.string())), problems)
    if table is not None:
        if len(table) != entry.samples:
            problems.append(f"{entry.table}: {len(table)} rows, {MANIFEST} says {entry.samples}")
        if not storage.exists(entry.index):
            problems.append(f"{entry.index}: missing")
        elif storage.read(entry.index) != energon.tar_index(table):
            problems.append(f"{entry.index}: does not match {entry.table}")
    if not storage.exists(entry.tar):
        problems.append(f"{entry.tar}: missing")
        return shard
    with contextlib.closing(storage.open(entry.tar)) as file:
        stream = _Hashed(file)
        if table is not None:
            problems += [f"{entry.tar}: {problem}" for problem in _differences(stream, table)]
        stream.finish()
    if stream.size != entry.bytes:
        problems.append(f"{entry.tar}: {stream.size} bytes, {MANIFEST} says {entry.bytes}")
    elif stream.sha256 != entry.sha256:
        problems.append(f"{entry.tar}: its SHA-256 is not the one in {MANIFEST}")
    return shard


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


# Staged files ----------------------------------------------------------------------------------------------------


def _staged(storage: Storage) -> Iterator[str]:
    """Yield the problems of the staged files that markers name: each name ends with the start of the file's SHA-256."""
    jobs = {name.split("/")[1] for name in storage.names("state") if name.startswith("state/ingest-")}
    units = list[Staged]()
    for job in sorted(jobs):
        try:
            units += staged(MarkerLog(storage, job).read()).values()
        except DamagedFile as error:
            yield str(error)
    present, freed = set(storage.names("staged")), may_be_freed(storage)
    listed = sorted({unit.table for unit in units} | {unit.tar for unit in units if unit.tar})
    for name, sha256 in zip(listed, ahead(lambda name: _sha256(storage, name, present), listed), strict=True):
        if sha256 is None:
            if not (freed and name.endswith(".tar")):
                yield f"{name}: missing"
        elif not sha256.startswith(name.rpartition("-")[2].partition(".")[0]):
            yield f"{name}: its SHA-256 is not the one in its name"


def _sha256(storage: Storage, name: str, present: Collection[str]) -> str | None:
    if name not in present:
        return None
    with contextlib.closing(storage.open(name)) as file:
        stream = _Hashed(file)
        stream.finish()
    return stream.sha256


# Keys ------------------------------------------------------------------------------------------------------------


def _words(keys: pa.ChunkedArray) -> Words:
    """Convert keys of 32 hexadecimal digits to four numbers each."""
    return np.frombuffer(bytes.fromhex("".join(keys.to_pylist())), ">u4").reshape(-1, 4).astype(np.uint32)


def _first(keys: Words) -> npt.NDArray[np.uint64]:
    """Return the first 8 bytes of each key."""
    return (keys[:, 0].astype(np.uint64) << np.uint64(32)) | keys[:, 1]


def _sum(keys: Words) -> int:
    """Return the sum of the keys, with their count in the high bits."""
    total = 0
    for part in [len(keys), *keys.sum(axis=0, dtype=np.uint64).tolist()]:
        total = (total << 32) + part
    return total


def _twice(storage: Storage, manifest: Manifest, firsts: list[npt.NDArray[np.uint64]]) -> Iterator[str]:
    """Yield keys that occur twice. Few keys share their first 8 bytes by chance, so only those are looked up."""
    if not firsts:
        return
    values, counts = np.unique(np.concatenate(firsts), return_counts=True)
    repeated = values[counts > 1]
    where: dict[str, str] = {}
    for entry, first in zip(manifest.shards, firsts, strict=True):
        if len(repeated) and np.isin(first, repeated).any():
            keys = storage.read_table(entry.table, ["key"])["key"].to_pylist()
            for row in np.nonzero(np.isin(first, repeated))[0]:
                if (key := keys[row]) in where:
                    yield f"{entry.table}: key {key} is also in {where[key]}"
                where[key] = entry.table


def _ledger(storage: Storage, manifest: Manifest, shards: Sums | None) -> list[str]:
    """Return the problems of the ledger's tables and counts, and where ledger and shards differ."""
    problems: list[str] = []
    outcomes, sums = Counter[str](), Sums()
    schema = with_scores(LEDGER_SCHEMA, [*fields_of(manifest.recipe), *pinned_columns(manifest.scores)])
    for entry, (table, found) in zip(
        manifest.ledger,
        ahead(lambda entry: _table(storage, entry.table, entry.sha256, schema), manifest.ledger),
        strict=True,
    ):
        problems += found
        if table is None:
            continue
        if len(table) != entry.rows:
            problems.append(f"{entry.table}: {len(table)} rows, {MANIFEST} says {entry.rows}")
        outcomes.update({item["values"]: item["counts"] for item in pc.value_counts(table["outcome"]).to_pylist()})
        kept = table.filter(pc.equal(table["outcome"], KEPT))
        for name in pc.unique(kept["shard"]).to_pylist():
            sums[name] += _sum(_words(kept.filter(pc.equal(kept["shard"], name))["key"]))
    if problems:
        return problems
    for outcome in OUTCOMES:
        if outcomes[outcome] != manifest.counts.get(outcome, 0):
            listed = manifest.counts.get(outcome, 0)
            problems.append(f"ledger: {outcomes[outcome]} rows {outcome}, {MANIFEST} says {listed}")
    if shards is not None:
        wrong = sorted(name for name in sums.keys() | shards.keys() if sums[name] != shards[name])
        problems += [f"ledger: the rows kept in {name or 'no shard'} are not those of its table" for name in wrong]
    return problems


# Indexes and tables ----------------------------------------------------------------------------------------------


def _indexes(storage: Storage, manifest: Manifest, *, tables_are_whole: bool) -> Iterator[str]:
    """Yield the problems of every index: its sum, and differences from the shards."""
    expected = indexes(manifest)
    if croissant.NAME not in manifest.indexes:  # of a version that did not write it
        expected.pop(croissant.NAME, None)
    for name in sorted(expected.keys() | manifest.indexes.keys()):
        if not storage.exists(name):
            yield f"{name}: missing"
        elif name == energon.INDEX:
            yield from _sqlite(storage, manifest, compare=tables_are_whole)
        elif storage.read(name) != expected.get(name):
            yield f"{name}: does not match {MANIFEST}"


def _sqlite(storage: Storage, manifest: Manifest, *, compare: bool) -> Iterator[str]:
    name = energon.INDEX
    with scratch() as folder:
        path = storage.local_path(name)
        copy = None if path else folder / "index.sqlite"
        with contextlib.closing(storage.open(name)) as file, contextlib.ExitStack() as stack:
            target = stack.enter_context(copy.open("wb")) if copy else None
            digest = hashlib.sha256()
            while data := file.read(_READ_BYTES):
                digest.update(data)
                if target:
                    target.write(data)
        if digest.hexdigest() != manifest.indexes.get(name):
            yield f"{name}: its SHA-256 is not the one in {MANIFEST}"
        elif compare and (at := path or copy) and not energon.sqlite_agrees(at, storage, manifest.shards):
            yield f"{name}: does not match the shards' tables"


def _table(storage: Storage, name: str, sha256: str, schema: pa.Schema) -> tuple[pa.Table | None, list[str]]:
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
