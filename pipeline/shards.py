"""Samples → tar shards, and finished shards → samples: the dataset folder as docs/formats.md describes it.

write_tar               samples → one WebDataset tar, always the same bytes for the same samples
Manifest                dataset.json: what a dataset holds; what it does not list does not exist for readers
Dataset                 a finished dataset: its tables, and its pictures by byte range, without scanning a tar
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import CapstanError, RecipeError
from pipeline.records import FORMAT_VERSION
from pipeline.storage import Storage

MANIFEST = "dataset.json"


@dataclass(frozen=True)
class Sample:
    """One picture and what is said of it. `key` has no dot and no slash; `fields` becomes KEY.json, `caption` KEY.txt.

    All samples of a dataset have the same `fields` keys and no nulls, since readers take the schema from the first few.
    Staged samples are pictures only: no `fields`, no `caption`.
    """

    key: str
    jpg: bytes
    fields: Mapping[str, str | int | float] | None = None
    caption: str | None = None


class Digest(Protocol):
    """What `hashlib` gives: grows with `update`."""

    def update(self, data: bytes, /) -> None: ...


class _Counted(io.RawIOBase):
    """A write-only stream that knows its position and feeds a digest."""

    def __init__(self, file: BinaryIO, digest: Digest | None) -> None:
        self.file, self.digest, self.position = file, digest, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.file.write(data)
        if self.digest is not None:
            self.digest.update(data)
        self.position += len(data)
        return len(data)

    def tell(self) -> int:
        return self.position


def write_tar(path: Path, samples: Iterable[Sample], digest: Digest | None = None) -> list[tuple[int, int]]:
    """Write `samples` to the local file `path`: KEY.jpg, KEY.json, KEY.txt, adjacent and in this order.

    USTAR with every header field fixed, so that the bytes depend on the samples alone. Gives (offset, size) of each
    JPEG in the tar, in bytes. `digest`, if given, takes in the tar's bytes as they are written.
    """
    spans: list[tuple[int, int]] = []
    with path.open("wb", buffering=1 << 20) as file:
        counted = _Counted(file, digest)
        with tarfile.open(fileobj=counted, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                _add(tar, f"{sample.key}.jpg", sample.jpg)
                padded = -len(sample.jpg) % tarfile.BLOCKSIZE + len(sample.jpg)
                spans.append((counted.position - padded, len(sample.jpg)))
                if sample.fields is not None:
                    _add(tar, f"{sample.key}.json", to_json(sample.fields))
                if sample.caption is not None:
                    _add(tar, f"{sample.key}.txt", sample.caption.encode("utf-8", "replace"))
    return spans


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # mtime, uid and gid 0, mode 0644, no owner names
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def to_json(fields: Mapping[str, Any]) -> bytes:
    """`fields` as JSON that is the same for the same fields: keys as they stand, compact, UTF-8."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True)


class ShardEntry(_Entry):
    """A shard: shards/NAME.tar (its `bytes` and `sha256`) and shards/NAME.parquet (`table_sha256`)."""

    name: str
    samples: int
    bytes: int
    sha256: str
    table_sha256: str

    @property
    def tar(self) -> str:
        return f"shards/{self.name}.tar"

    @property
    def table(self) -> str:
        return f"shards/{self.name}.parquet"


class LedgerEntry(_Entry):
    """A ledger table: ledger/NAME.parquet."""

    name: str
    rows: int
    sha256: str

    @property
    def table(self) -> str:
        return f"ledger/{self.name}.parquet"


class Manifest(_Entry):
    """dataset.json. `recipe` holds the sections that decide what is in the dataset, `recipe_hash` is their hash.

    `selection` changes with anything that decides which rows are kept and what is staged of them; `complete` is False
    while shards are being rewritten.
    """

    format_version: int = FORMAT_VERSION
    recipe: dict[str, Any] = {}
    recipe_hash: str = ""
    selection: str = ""
    complete: bool = True
    counts: dict[str, int] = {}
    funnel: list[dict[str, Any]] = []  # {step, rows}: rows left after each step of the selection
    shards: list[ShardEntry] = []
    ledger: list[LedgerEntry] = []


def read_manifest(storage: Storage) -> Manifest | None:
    """The manifest of the dataset at `storage`, or None where there is none.

    Raises CapstanError for a manifest that this version cannot read.
    """
    if not storage.exists(MANIFEST):
        return None
    try:
        manifest = Manifest.model_validate_json(storage.read(MANIFEST))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CapstanError(f"{storage.url}/{MANIFEST} is not a manifest: {where}: {problem['msg']}") from None
    if manifest.format_version > FORMAT_VERSION:
        raise CapstanError(f"{storage.url} was written by a newer Capstan (format {manifest.format_version})")
    return manifest


def write_manifest(storage: Storage, manifest: Manifest) -> None:
    """Publish `manifest` atomically."""
    storage.write(MANIFEST, json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False).encode() + b"\n")


class Dataset:
    """A finished dataset for readers. Raises RecipeError where there is none. Can be pickled to workers."""

    def __init__(self, storage: Storage) -> None:
        manifest = read_manifest(storage)
        if manifest is None:
            raise RecipeError(storage.field, f"no dataset at {storage.url}", "run `capstan build` first")
        self.storage, self.manifest = storage, manifest

    @property
    def shard_names(self) -> list[str]:
        return [entry.name for entry in self.manifest.shards]

    def table(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """The shard's samples in tar order (records.SHARD_SCHEMA)."""
        return self.storage.read_table(f"shards/{shard}.parquet", columns)

    def ledger(self, columns: list[str] | None = None) -> pa.Table:
        """One row for every input row (records.LEDGER_SCHEMA)."""
        tables = [self.storage.read_table(entry.table, columns) for entry in self.manifest.ledger]
        return pa.concat_tables(tables)

    def read_images(self, shard: str, rows: Sequence[int] | None = None) -> Iterator[tuple[str, bytes]]:
        """(key, JPEG bytes) of the shard's samples, or of the given rows of its table, in the order given."""
        table = self.table(shard, ["key", "offset", "size"])
        if rows is not None:
            table = table.take(pa.array(rows, pa.int64()))
        with self.storage.open(f"shards/{shard}.tar") as tar:
            for key, offset, size in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
                tar.seek(offset)
                jpeg = tar.read(size)
                if len(jpeg) != size:
                    raise CapstanError(f"{self.storage.url}/shards/{shard}.tar is cut: run `capstan verify`")
                yield key, jpeg


def sha256_of(data: bytes) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
