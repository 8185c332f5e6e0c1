"""`source` of the recipe → tables of rows: url, caption, where the picture lies, and the other columns as JSON.

Tables are streamed: Parquet by row group, text by line. Nothing here looks at pixels.

    parquet csv tsv jsonl txt     rows with an address, or (parquet) with embedded bytes; text also as .gz .zst .bz2 .xz
    folder                        images with NAME.txt or NAME.json beside them
    webdataset                    tars of KEY.jpg, KEY.txt, KEY.json; pictures stay where they are, read by byte range
    world                         the captioned world that Capstan draws itself
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Recipe, Source, fingerprint
from pipeline.errors import RecipeError
from pipeline.records import PLAN_SCHEMA, make_key
from pipeline.storage import SourceFile, find_files, open_file, read_span

BATCH_ROWS = 4096
BATCH_BYTES = 64 << 20  # of embedded pictures
IMAGES = frozenset([".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif"])
_TABLES = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
    ".tar": "webdataset",
}
_PACKED = frozenset([".gz", ".zst", ".bz2", ".xz"])


@dataclass(frozen=True)
class Row:
    """One input row, before it has a key. As PLAN_SCHEMA; `path` is what a row of a folder or a tar is known by."""

    url: str = ""
    caption: str = ""
    image: bytes | None = None
    file: str = ""
    offset: int = 0
    length: int = 0
    extra: str = "{}"

    @property
    def key(self) -> str:
        """By the file it lies in; or by its bytes and caption; or by its address and caption. A row that has none of
        these (it will fail with a reason) is known by all that it has."""
        if self.file:
            return make_key("file", self.url)
        if self.image:
            return make_key("image", self.image, self.caption)
        if self.url:
            return make_key(self.url, self.caption)
        return make_key("row", self.caption, self.extra)


class Rows:
    """The rows of a recipe's source. `signature` changes when the source does, so that planning can be skipped."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.source is None:
            raise RecipeError("source", "is missing", "say where the rows come from")
        self.source = recipe.source
        self._options = dict(recipe.storage)
        self._protocol = recipe.dataset.partition("://")[0] if "://" in recipe.dataset else ""
        self.files = [] if self.source.format == "world" else self._find()
        stamps = [(file.path, file.size, file.stamp) for file in self.files]
        self.signature = fingerprint([self.source.model_dump(mode="json"), stamps])

    def tables(self) -> Iterator[pa.Table]:
        """All rows, with their keys, as tables of PLAN_SCHEMA of bounded size."""
        return _in_tables(self._rows())

    def _find(self) -> list[SourceFile]:
        paths = self.source.path if isinstance(self.source.path, list) else [self.source.path or ""]
        return [file for path in paths for file in find_files(path, self._options_of(path))]

    def _options_of(self, path: str) -> dict[str, Any]:
        """fsspec options in `storage` are the dataset's; they hold for a source on the same kind of storage."""
        same = self._protocol and path.startswith(f"{self._protocol}://")
        return self._options if same else {}

    def _rows(self) -> Iterator[Row]:
        if self.source.format == "world":
            yield from _world(self.source)
            return
        kinds = [(self._kind(file), file) for file in self.files]
        if self.source.format == "folder" or (self.source.format == "auto" and any(k == "image" for k, _ in kinds)):
            yield from _folder(self.files, self.source, self._open)
            return
        if not any(kind in _READERS for kind, _ in kinds):
            known = ", ".join(sorted(_READERS))
            raise RecipeError("source.format", f"cannot tell the format of {self.files[0].path}", f"say one of {known}")
        for kind, file in kinds:
            if reader := _READERS.get(kind):
                yield from reader(file, self.source, self._open)

    def _kind(self, file: SourceFile) -> str:
        path = PurePosixPath(file.path.lower())
        suffix = PurePosixPath(path.stem).suffix if path.suffix in _PACKED else path.suffix
        if self.source.format not in ("auto", "folder"):
            return self.source.format
        return "image" if suffix in IMAGES else _TABLES.get(suffix, "")

    def _open(self, path: str, unpack: bool = False) -> Any:
        return open_file(path, self._options_of(path), unpack=unpack)


Open = Callable[..., Any]


def read_bytes(file: str, offset: int, length: int, recipe: Recipe) -> bytes:
    """The picture of a row that lies in a file: `length` bytes at `offset`."""
    protocol = recipe.dataset.partition("://")[0] if "://" in recipe.dataset else ""
    options = recipe.storage if protocol and file.startswith(f"{protocol}://") else {}
    return read_span(file, options, offset, length)


def _in_tables(rows: Iterable[Row]) -> Iterator[pa.Table]:
    columns: dict[str, list[Any]] = {name: [] for name in PLAN_SCHEMA.names}
    size = 0
    for row in rows:
        for name in PLAN_SCHEMA.names:
            columns[name].append(getattr(row, name))
        size += len(row.image or b"")
        if len(columns["key"]) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield pa.table(columns, schema=PLAN_SCHEMA)
            columns, size = {name: [] for name in PLAN_SCHEMA.names}, 0
    if columns["key"]:
        yield pa.table(columns, schema=PLAN_SCHEMA)


# Tables --------------------------------------------------------------------------------------------------------------


def _parquet(file: SourceFile, source: Source, open_: Open) -> Iterator[Row]:
    with open_(file.path) as stream:
        try:
            table = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise RecipeError("source.path", f"{file.path} is not Parquet ({error})", "name a Parquet file") from None
        _check_columns(source, table.schema_arrow.names, file)
        for batch in table.iter_batches(batch_size=256 if source.image else BATCH_ROWS):
            for record in batch.to_pylist():
                yield _row(record, source)


def _separated(delimiter: str) -> Callable[[SourceFile, Source, Open], Iterator[Row]]:
    def read(file: SourceFile, source: Source, open_: Open) -> Iterator[Row]:
        with _text(open_(file.path, unpack=True), newline="") as stream:
            lines = csv.reader(stream, delimiter=delimiter)
            names = next(lines, [])
            _check_columns(source, names, file)
            for cells in lines:
                if cells:
                    yield _row(dict(itertools.zip_longest(names, cells[: len(names)], fillvalue="")), source)

    return read


def _jsonl(file: SourceFile, source: Source, open_: Open) -> Iterator[Row]:
    with _text(open_(file.path, unpack=True)) as stream:
        checked = False
        for line in stream:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                yield _row({"unreadable_line": line.strip()}, source)  # fails as bad_url, in plain sight
                continue
            if not checked:
                _check_columns(source, list(record), file)
                checked = True
            yield _row(record, source)


def _txt(file: SourceFile, source: Source, open_: Open) -> Iterator[Row]:
    with _text(open_(file.path, unpack=True)) as stream:
        for line in stream:
            if url := line.strip():
                yield Row(url=url)


def _text(stream: Any, newline: str | None = None) -> io.TextIOWrapper:
    """UTF-8, with or without a byte order mark; closes `stream` when closed."""
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=newline)


def _check_columns(source: Source, names: list[str], file: SourceFile) -> None:
    """Raise RecipeError for a column that the recipe names and the table has not."""
    wanted = [("caption", source.caption)]
    wanted.append(("image", source.image) if source.image else ("url", source.url))
    for key, column in wanted:
        if column not in names:
            near = _nearest(column, names)
            mend = f"did you mean {near}?" if near else "name one of its columns"
            columns = ", ".join(names[:20])
            raise RecipeError(f"source.{key}", f"no column {column!r} in {file.path} (it has: {columns})", mend)


def _nearest(column: str, names: list[str]) -> str:
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(column.lower(), list(lower), n=1, cutoff=0.5)
    return lower[near[0]] if near else ""


def _row(record: dict[str, Any], source: Source) -> Row:
    url = _as_text(record.pop(source.url, None))
    caption = _as_text(record.pop(source.caption, None))
    image = _embedded(record.pop(source.image, None)) if source.image else None
    return Row(url=url, caption=caption, image=image, extra=_extra(record))


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "replace").decode()  # lone surrogates do not pass through Arrow


def _embedded(value: Any) -> bytes:
    """The bytes in a cell: plain, or as Hugging Face's {bytes, path}. b"" where there are none: it fails as `empty`."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else b""


def _extra(record: Mapping[str, Any]) -> str:
    """The other columns as a JSON object with sorted keys; what JSON does not know is written as text."""
    if not record:
        return "{}"
    text = json.dumps(dict(sorted(record.items())), ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "replace").decode()


# Files ---------------------------------------------------------------------------------------------------------------


def _folder(files: list[SourceFile], source: Source, open_: Open) -> Iterator[Row]:
    beside = {file.path for file in files}
    for file in files:
        path = PurePosixPath(file.path)
        if path.suffix.lower() not in IMAGES:
            continue
        stem = file.path.removesuffix(path.suffix)
        record: dict[str, Any] = {}
        if f"{stem}.json" in beside:
            record = _json_object(_read(open_, f"{stem}.json"))
        caption = _as_text(record.pop(source.caption, None))
        if f"{stem}.txt" in beside:
            caption = _read(open_, f"{stem}.txt").decode("utf-8", "replace").strip()
        yield Row(url=file.path, caption=caption, file=file.path, length=file.size, extra=_extra(record))


def _webdataset(file: SourceFile, source: Source, open_: Open) -> Iterator[Row]:
    with open_(file.path) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for key, members in itertools.groupby((m for m in tar if m.isfile()), key=_sample_name):
                    yield from _sample(key, list(members), tar, file, source)
        except tarfile.ReadError as error:
            problem = f"{file.path} is not an uncompressed tar ({error})"
            raise RecipeError("source.path", problem, "unpack it, or remove the broken file") from None


def _sample(
    key: str, members: list[tarfile.TarInfo], tar: tarfile.TarFile, file: SourceFile, source: Source
) -> Iterator[Row]:
    picture, caption, record = None, "", dict[str, Any]()
    for member in members:
        suffix = PurePosixPath(member.name).suffix.lower()
        if suffix in IMAGES and picture is None:
            picture = member
        elif suffix == ".txt":
            caption = _member(tar, member).decode("utf-8", "replace").strip()
        elif suffix == ".json":
            record = _json_object(_member(tar, member))
    if picture is None:
        return
    caption = caption or _as_text(record.get(source.caption))
    record.pop(source.caption, None)
    url = f"{file.path}#{picture.name}"
    yield Row(url, caption, None, file.path, picture.offset_data, picture.size, _extra(record))


def _sample_name(member: tarfile.TarInfo) -> str:
    """What the members of a sample share: the path up to the last dot of the file name."""
    return member.name[: -len(suffix)] if (suffix := PurePosixPath(member.name).suffix) else member.name


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    return stream.read() if stream else b""


def _read(open_: Open, path: str) -> bytes:
    with open_(path) as stream:
        return bytes(stream.read())


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _world(source: Source) -> Iterator[Row]:
    from pipeline.config import WorldSource
    from pipeline.world.rows import rows

    for record in rows(source.world or WorldSource()):
        yield Row(url=record.pop("url"), caption=record.pop("caption"), extra=_extra(record))


_READERS: dict[str, Callable[[SourceFile, Source, Open], Iterator[Row]]] = {
    "parquet": _parquet,
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "jsonl": _jsonl,
    "txt": _txt,
    "webdataset": _webdataset,
}
