"""Tar shards, dataset.json and tables: written and read

write_samples           samples → one WebDataset tar; equal samples give equal bytes
Manifest                dataset.json: the content of a dataset; files that it does not list do not exist for readers
Dataset                 a finished dataset: its tables, and its images by byte range, without scanning a tar

docs/formats.md describes the dataset folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, NamedTuple, Protocol

import pyarrow as pa
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from capstan.pipeline.dataset.parts import PARTS, PartPlace, part_fields, read_parts
from capstan.pipeline.errors import CapstanError, DamagedFile, RecipeError
from capstan.pipeline.records import FORMAT_VERSION
from capstan.pipeline.storage import Storage, is_inside

MANIFEST = "dataset.json"
CLIPS = "clips.json"  # the manifest of a folder of clips (pipeline.clips.cut)


@dataclass(frozen=True)
class Sample:
    """An image with its caption and fields. `key` has no dot and no slash.

    `fields` becomes KEY.json, `caption` KEY.txt. All samples of a dataset have the same keys in `fields`, and no nulls,
    since readers take the schema from the first samples. Staged samples are images only: no `fields`, no `caption`.
    `parts` holds more files of the sample by suffix, e.g. {"mp4": …}: they come next to the image.
    """

    key: str
    jpg: bytes
    fields: Mapping[str, str | int | float] | None = None
    caption: str | None = None
    parts: Mapping[str, bytes] = field(default_factory=dict)


class Place(NamedTuple):
    """The position of a sample in its tar, in bytes: its JPEG's data, and the size of its JSON, which comes next.

    `crc32` is the JPEG's, None in datasets of older versions.
    """

    offset: int
    size: int
    json_size: int
    crc32: int | None
    parts: Mapping[str, PartPlace] = {}  # by suffix; not a column of its own, see dataset.parts


PLACE_COLUMNS: Final = ("offset", "size", "json_size", "crc32")


class Digest(Protocol):
    """A hash object of `hashlib`."""

    def update(self, data: bytes, /) -> None: ...


BLOCK = 512  # bytes: a member is a header of one block, and its data in whole blocks
_RECORD = 10_240  # bytes: a tar ends with two empty blocks and is padded to a multiple of this

# A regular file's header with mode 0644 and owner 0, without name (100 bytes), size and checksum.
_OWNER = b"0000644\0" + b"0000000\0" * 2
_TIME = b"00000000000\0"
_KIND = b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(BLOCK - 265)
_FIXED_SUM = sum(_OWNER + _TIME + _KIND) + 8 * ord(" ")


def tar_header(name: str, size: int) -> bytes:
    """Return the USTAR header of a member; every field but name and size is constant, on any version of Python."""
    raw, octal = name.encode("ascii"), b"%011o\0" % size
    assert len(raw) <= 100, name
    assert size < 8**11, name
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(raw) + sum(octal))
    return b"".join((raw.ljust(100, b"\0"), _OWNER, octal, _TIME, checksum, _KIND))


def tar_end(position: int) -> bytes:
    """Return the padding after the last member, which ends at `position`."""
    return bytes(2 * BLOCK + -(position + 2 * BLOCK) % _RECORD)


def write_samples(path: Path, samples: Iterable[Sample], digest: Digest | None = None) -> list[Place]:
    """Write `samples` to the local file `path`: KEY.jpg, its parts, KEY.json, KEY.txt, adjacent and in this order.

    Returns the samples' positions. The bytes depend on the samples alone. `digest`, if given, is updated with the tar's
    bytes as they are written.
    """
    places: list[Place] = []
    position = 0
    with path.open("wb", buffering=1 << 20) as file:

        def write(data: bytes) -> None:
            nonlocal position
            file.write(data)
            if digest is not None:
                digest.update(data)
            position += len(data)

        for sample in samples:
            fields = None if sample.fields is None else to_json(sample.fields)
            image, parts = position + BLOCK, dict[str, PartPlace]()
            write(_member(f"{sample.key}.jpg", sample.jpg))
            for suffix, data in sample.parts.items():
                parts[suffix] = PartPlace(position + BLOCK, len(data), zlib.crc32(data))
                write(_member(f"{sample.key}.{suffix}", data))
            places.append(Place(image, len(sample.jpg), len(fields or b""), zlib.crc32(sample.jpg), parts))
            if fields is not None:
                write(_member(f"{sample.key}.json", fields))
            if sample.caption is not None:
                write(_member(f"{sample.key}.txt", sample.caption.encode("utf-8", "replace")))
        write(tar_end(position))
    return places


def write_tar(path: Path, samples: Iterable[Sample], digest: Digest | None = None) -> list[tuple[int, int]]:
    """Write `samples` as `write_samples` does; return (offset, size) of each JPEG in the tar, in bytes."""
    return [(place.offset, place.size) for place in write_samples(path, samples, digest)]


def _member(name: str, data: bytes) -> bytes:
    return b"".join((tar_header(name, len(data)), data, bytes(-len(data) % BLOCK)))


def to_json(fields: Mapping[str, Any]) -> bytes:
    """Return `fields` as compact JSON in UTF-8, with keys in their given order: equal fields give equal bytes."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")


# Names and sums become parts of file names, so nothing else may stand in their place.
_Name = Annotated[str, StringConstraints(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\z")]
_Sum = Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{0,64}\z")]
_Count = Annotated[int, Field(ge=0)]


def _inside(name: str) -> str:
    if not is_inside(name):
        raise ValueError(f"{name[:200]!r} is not the name of a file inside the dataset")
    return name


_Histogram = Annotated[str, StringConstraints(pattern=r"\A[0-9* ]{0,4000}\z")]
_Path = Annotated[str, AfterValidator(_inside)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True)


class ShardEntry(_Entry):
    """A shard: shards/NAME.tar (`bytes` and `sha256`), NAME.parquet (`table_sha256`) and NAME.tar.idx.

    The content of the index follows from the table. `ratios` counts the images' aspect ratios (dataset.ratios), "" if
    an earlier version wrote the shard.
    """

    name: _Name
    samples: _Count
    bytes: _Count
    sha256: _Sum
    table_sha256: _Sum
    ratios: _Histogram = ""

    @property
    def tar(self) -> str:
        return f"shards/{self.name}.tar"

    @property
    def table(self) -> str:
        return f"shards/{self.name}.parquet"

    @property
    def index(self) -> str:
        return f"{self.tar}.idx"


class LedgerEntry(_Entry):
    """A ledger table: ledger/NAME.parquet."""

    name: _Name
    rows: _Count
    sha256: _Sum

    @property
    def table(self) -> str:
        return f"ledger/{self.name}.parquet"


class Manifest(_Entry):
    """dataset.json. `recipe` holds the sections that decide the content of the dataset, `recipe_hash` their hash.

    `selection` is a hash of everything that decides which rows are kept and how they are staged; `complete` is False
    while shards are being rewritten. `indexes` lists the index files for other tools with their SHA-256. The file ends
    with `seal`, the SHA-256 of all fields before it.
    """

    format_version: int = FORMAT_VERSION
    recipe: dict[str, Any] = {}
    recipe_hash: str = ""
    selection: str = ""
    complete: bool = True
    counts: dict[str, int] = {}
    licenses: dict[str, int] = {}  # SPDX expression → kept rows, if the recipe names the source's licences
    funnel: list[dict[str, Any]] = []  # {step, rows}: rows left after each step of the selection
    shards: list[ShardEntry] = []
    ledger: list[LedgerEntry] = []
    indexes: dict[_Path, _Sum] = {}
    scores: list[dict[str, Any]] = []  # identifies the scorers of the tables' columns (pipeline.score.store.pins)

    @model_validator(mode="after")
    def _every_name_once(self) -> Manifest:
        for kind, names in (("shards", self.shards), ("ledger", self.ledger)):
            if twice := [name for name, count in Counter(entry.name for entry in names).items() if count > 1]:
                raise ValueError(f"{kind} lists {twice[0]} twice")
        return self


def read_manifest(storage: Storage) -> Manifest | None:
    """Return the manifest of the dataset at `storage`, None if there is no dataset.

    Raises CapstanError for a file that is no manifest, and RecipeError for one of a newer version.
    """
    if not storage.exists(MANIFEST):
        return None
    try:
        manifest = Manifest.model_validate_json(storage.read(MANIFEST))
    except ValidationError as error:
        problem = error.errors()[0]
        where = " ".join(".".join(str(part)[:200] for part in problem["loc"]).split())
        raise CapstanError(f"{storage.url}/{MANIFEST} is not a manifest: {where}: {problem['msg']}") from None
    if manifest.format_version > FORMAT_VERSION:
        newer = f"{storage.url} has format {manifest.format_version}, and this Capstan reads up to {FORMAT_VERSION}"
        raise RecipeError(storage.field, newer, "upgrade: pip install --upgrade capstan-t2i")
    return manifest


def write_manifest(storage: Storage, manifest: Manifest) -> None:
    """Publish `manifest` atomically."""
    storage.write(MANIFEST, manifest_bytes(manifest))


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the content of dataset.json."""
    return _sealed(manifest.model_dump())


def seal_holds(data: bytes) -> bool:
    """Return whether the bytes of dataset.json are those that were written."""
    try:
        fields = json.loads(data)
    except ValueError:
        return False
    return isinstance(fields, dict) and fields.pop("seal", None) is not None and _sealed(fields) == data


def _sealed(fields: dict[str, Any]) -> bytes:
    def text(value: dict[str, Any]) -> bytes:
        return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"

    return text(fields | {"seal": sha256_of(text(fields))})


class Dataset:
    """A finished dataset for readers. Can be pickled to workers. Raises RecipeError if there is none."""

    def __init__(self, storage: Storage, manifest: Manifest | None = None) -> None:
        """Open the dataset at `storage`; `manifest`, if given, is what is known of it already."""
        if manifest is None:
            storage.check_reachable()
            manifest = read_manifest(storage)
        if manifest is None:
            raise RecipeError(storage.field, f"no dataset at {storage.url}", "run `capstan build` first")
        self.storage, self.manifest = storage, manifest
        self._entries = {entry.name: entry for entry in manifest.shards}

    def part(self, *entries: Mapping[str, Any]) -> Dataset:
        """Return the dataset of these shards alone (fields of ShardEntry), without reading anything.

        Jobs travel to workers with no shard, and units with the entry of theirs: the manifest of 100,000 shards has
        42 MB, and would be sent with every unit.
        """
        return Dataset(self.storage, Manifest(shards=[ShardEntry(**entry) for entry in entries]))

    @property
    def shard_names(self) -> list[str]:
        return [entry.name for entry in self.manifest.shards]

    def table(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """Return the table of a shard's samples in tar order (records.SHARD_SCHEMA). Raises DamagedFile."""
        entry = self._entries[shard]
        return self.storage.read_table(entry.table, columns, sha256=entry.table_sha256)

    def ledger(self, columns: list[str] | None = None) -> pa.Table:
        """Return the ledger: one row for every input row (records.LEDGER_SCHEMA). Raises DamagedFile."""
        tables = [self.storage.read_table(entry.table, columns, sha256=entry.sha256) for entry in self.manifest.ledger]
        return pa.concat_tables(tables)

    def read_images(self, shard: str, rows: Sequence[int] | None = None) -> Iterator[tuple[str, bytes]]:
        """Yield (key, JPEG bytes) of the shard's samples, or of the given rows of its table, in the given order.

        Raises DamagedFile for an image that is not what was written.
        """
        for key, jpeg, _ in self.read_samples(shard, rows, parts=False):
            yield key, jpeg

    def read_samples(
        self, shard: str, rows: Sequence[int] | None = None, *, parts: bool = True
    ) -> Iterator[tuple[str, bytes, dict[str, bytes]]]:
        """Yield (key, JPEG bytes, parts by suffix) as `read_images` does; without `parts` only the JPEGs are read.

        Raises DamagedFile for a file that is not what was written.
        """
        table = self.table(shard, ["key", "offset", "size", "crc32", *(f.name for f in part_fields(PARTS) if parts)])
        if rows is not None:
            table = table.take(pa.array(rows, pa.int64()))
        name = f"shards/{shard}.tar"
        with listed(self.storage.path(name)):
            opened = self.storage.open(name)
        with opened as tar:
            for row in table.to_pylist():
                path = self.storage.path(name)
                jpeg = read_image(tar, row["offset"], row["size"], row.get("crc32"), path)
                yield row["key"], jpeg, read_parts(tar, row, path)


@contextlib.contextmanager
def listed(name: str) -> Iterator[None]:
    """Raise DamagedFile if the file `name`, which the manifest lists, is missing."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedFile(name, "it is missing") from None


def read_image(tar: BinaryIO, offset: int, size: int, crc32: int | None, name: str) -> bytes:
    """Read an image from an open tar and compare it with what was written. Raises DamagedFile naming `name`."""
    tar.seek(offset)
    return check_image(tar.read(size), size, crc32, name)


def check_image(jpeg: bytes, size: int, crc32: int | None, name: str) -> bytes:
    """Return the bytes of an image of the tar `name`. Raises DamagedFile if its size or CRC-32 is not as written."""
    if len(jpeg) != size:
        raise DamagedFile(name, "it ends within an image")
    if crc32 is not None and zlib.crc32(jpeg) != crc32:
        raise DamagedFile(name, "an image is not what was written")
    return jpeg


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 sum in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
