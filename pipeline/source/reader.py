"""The recipe's `source` → tables of rows, whatever the format

    parquet csv tsv jsonl txt     rows with a URL, or (parquet) with embedded images; text also as .gz .zst .bz2 .xz
    folder                        images with NAME.txt or NAME.json next to them, or with metadata.jsonl
    webdataset                    tars of KEY.jpg, KEY.txt, KEY.json (see samples.py)
    world                         the captioned world that Capstan draws itself

A row has a URL, a caption, the position of its image, and the other columns as JSON. No pixels are read here. Memory
does not grow with the source, but with the samples of one tar.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
import lzma
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from capstan.pipeline.config import Recipe, Source, WorldSource, fingerprint
from capstan.pipeline.dataset.own_shards import own_rows, own_table
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.source import tables
from capstan.pipeline.source.bounds import bounded
from capstan.pipeline.source.columns import Row, of_rows, to_json
from capstan.pipeline.source.folders import by_table, folder, is_read_by_table, webdataset
from capstan.pipeline.source.formats import FormatGuess, FormatPolicy, kind_of
from capstan.pipeline.source.image_metadata import FILE_NAME, ImageMetadata
from capstan.pipeline.source.image_reader import Span, options_of, read_images
from capstan.pipeline.source.samples import IMAGES, TAR_IMAGES, Suffixes
from capstan.pipeline.source.table_checks import check
from capstan.pipeline.source.tables import Reader
from capstan.pipeline.storage import list_files, open_file
from capstan.pipeline.storage.listing import Batches, SourceFile, in_batches
from capstan.pipeline.storage.local import scratch

log = logging.getLogger(__name__)

_CHECKED_AT_ONCE = 16  # tables
_MOST_FILES = 200_000  # whose ids are kept, so that only new ones are read
_TEXT_BYTES = 32  # of a table as text, perhaps compressed, and
_TAR_BYTES = 4096  # of a tar, that take as long to plan as a row of Parquet
_BATCH_ROWS = 4096  # rows of a folder or a tar in a table,
_BATCH_BYTES = 16 << 20  # and characters of their text
_TABLES: dict[str, Reader] = {
    "parquet": tables.parquet,
    "csv": tables.separated("csv"),
    "tsv": tables.separated("tsv"),
    "jsonl": tables.jsonl,
    "txt": tables.txt,
}

OUTSIDE = "links out of the folder"  # counted next to the suffixes of files that are not used


class FileReader:
    """Reads one table or tar of a recipe's source at a time, on any machine.

    `unused` counts, by suffix, the members of tars that no row was made of.
    """

    def __init__(self, recipe: Recipe, suffixes: Suffixes = IMAGES) -> None:
        """Read the source of a recipe; `suffixes` are those of the files in tars that rows are of."""
        assert recipe.source is not None
        self.source, self.suffixes, self._recipe = recipe.source, suffixes, recipe
        self.unused = Counter[str]()

    def tables(self, kind: str, file: SourceFile) -> Iterator[pa.Table]:
        """Yield a file's rows as tables of PLAN_SCHEMA of bounded size; `kind` is its format.

        Raises RecipeError if it cannot be read.
        """
        with _reading(file.path):
            yield from map(bounded, self._rows(kind, file))

    def check(self, kind: str, file: SourceFile) -> int:
        """Return about how many rows take as long to plan as this file's.

        Raises RecipeError for a table that cannot be right; reads no row of it.
        """
        if kind not in _TABLES:
            return file.size // _TAR_BYTES
        with _reading(file.path):
            rows = check(kind, file, self.source, self.open)
        return file.size // _TEXT_BYTES if rows is None else rows

    def open(self, path: str, *, ahead: bool = True) -> Any:
        """Return a reader of a file of the source."""
        return open_file(path, options_of(path, self._recipe), ahead=ahead)

    def _rows(self, kind: str, file: SourceFile) -> Iterator[pa.Table]:
        if kind == "webdataset":
            header = self._recipe.image.check == "header"
            table = own_table(file.path, file.size, self.open) if header else None
            if table is not None and self.suffixes == IMAGES and is_read_by_table(table, self.source):
                return (by_table(file, part, self.source) for part in _slices(table))
            own = {} if table is None else own_rows(table)
            suffixes = TAR_IMAGES if self.suffixes == IMAGES else self.suffixes
            return _in_tables(webdataset(file, self.source, self.open, self.unused, own, suffixes))
        return _TABLES[kind](file, self.source, self.open)


@dataclass(frozen=True, slots=True)
class SourcePart:
    """A table or a tar of the source, its format, about how many rows take as long to plan as its rows, and its id.

    The id changes with the file and with how it is read.
    """

    kind: str
    file: SourceFile
    rows: int
    id: str


class SourceReader:
    """The rows of a recipe's source. `signature` changes when the source does, so that planning can be skipped.

    `unused` counts, by suffix, the files of folders and members of tars that no row was made of, once all are read.

    The files of one folder or glob on a disk are listed each time they are needed; of tables and tars those to read are
    held. Raises RecipeError for a source that does not exist.
    """

    def __init__(self, recipe: Recipe, suffixes: Suffixes = IMAGES) -> None:
        """Open the source of a recipe; `suffixes` are those of the files in folders and tars that rows are of."""
        if recipe.source is None:
            raise RecipeError("source", "is missing", "set source.path to the files that hold the rows")
        self._reader, self._suffixes = FileReader(recipe, suffixes), suffixes
        self.source, self._recipe = recipe.source, recipe
        self.unused = self._reader.unused
        self._paths = self.source.path if isinstance(self.source.path, list) else [self.source.path or ""]
        self._kinds, self._gathered = dict[str, FormatGuess](), list[SourceFile]()
        self._outside = dict[str, int]()  # path of the source → links to texts outside it, which are not read
        settings = self.source.model_dump(mode="json", exclude={"storage", "path"})
        self._settings = fingerprint([settings, recipe.image.check])  # what a file's rows depend on
        self.signature = self._signature()

    def tables(
        self, without: Collection[str] = (), parts: Sequence[SourcePart] | None = None
    ) -> Generator[pa.Table, None, None]:
        """Yield all rows, with their keys, as tables of PLAN_SCHEMA of bounded size.

        Files whose id (see `files`) is in `without` are left out; `parts` are the others, if they are known. Raises
        RecipeError for a file that cannot be read.
        """
        if parts is None:
            parts = self.parts(without)
        if parts is None:
            rows = _in_tables(_world(self.source)) if self.source.format == "world" else self._folder()
            yield from map(bounded, rows)
        for part in parts or ():
            yield from self._reader.tables(part.kind, part.file)
        self.note_unused({})

    def parts(self, without: Collection[str] = ()) -> list[SourcePart] | None:
        """Return the files to read, in order; None if rows are of no single file, as in a folder of images.

        Files whose id (see `files`) is in `without` are left out. Raises RecipeError for the first table that cannot be
        right, before a row of any is read.
        """
        if self.source.format == "world" or (choice := self._choice()).images:
            return None
        parts, found, left, first = list[SourcePart](), 0, 0, ""
        with ThreadPoolExecutor(_CHECKED_AT_ONCE) as pool:
            for batch in self._files():
                named = list(choice.of(batch))
                other = [file.path for kind, file in named if not kind]
                left, first = left + len(other), first or next(iter(other), "")
                pairs = [(kind, file) for kind, file in named if kind]
                found += len(pairs)
                chosen = [(pair, name) for pair in pairs if (name := self._id(*pair)) not in without]
                rows = pool.map(lambda one: self._reader.check(*one[0]), chosen)
                parts += [SourcePart(*pair, count, name) for (pair, name), count in zip(chosen, rows, strict=True)]
        if not found:
            hint = f"set it to one of {', '.join([*_TABLES, 'webdataset', 'folder'])}"
            raise RecipeError("source.format", f"cannot tell the format of {first}", hint)
        if left:
            log.warning("source: skipped %d files whose names are not those of tables: %s …", left, first)
        return parts

    def note_unused(self, counts: Mapping[str, int]) -> None:
        """Add what was not used of files that were read elsewhere, and of what is outside the source."""
        self.unused.update(counts)
        if outside := sum(self._outside.values()):
            self.unused[OUTSIDE] = outside

    @property
    def reader(self) -> FileReader:
        """What reads one file of the source."""
        return self._reader

    def files(self) -> list[str] | None:
        """Return the id (see SourcePart) of each file that is read.

        None if rows are of no single file, as in a folder of images, or if there are more than `_MOST_FILES`.
        """
        if self.source.format == "world" or (choice := self._choice()).images:
            return None
        found = [self._id(kind, file) for batch in self._files() for kind, file in choice.of(batch) if kind]
        return found if len(found) <= _MOST_FILES else None

    def _choice(self) -> FormatPolicy:
        return FormatPolicy(self.source, self._kinds.values(), self._suffixes)

    def _id(self, kind: str, file: SourceFile) -> str:
        return fingerprint([self._settings, kind, file.path, file.size, file.stamp])

    def _folder(self) -> Iterator[pa.Table]:
        described = [file for guess in self._kinds.values() for file in guess.metadata]
        with contextlib.ExitStack() as stack:
            metadata = None
            if described:
                metadata = ImageMetadata(stack.enter_context(scratch()))
                stack.callback(metadata.close)
                for file in described:
                    metadata.add(file, _guarded(self._metadata(file), file.path))
            rows = folder(self._files(), self.source, self._read_all, metadata, self.unused, self._suffixes)
            yield from _guarded(_in_tables(rows), str(self.source.path))
            if metadata is not None and metadata.used < metadata.rows:
                log.warning("source: %d rows of metadata name no image", metadata.rows - metadata.used)

    def _metadata(self, file: SourceFile) -> Iterator[pa.Table]:
        """Yield the rows of a file that describes a folder's images, with the image's name as their URL."""
        source = self.source.model_copy(update={"url": FILE_NAME, "image": None})
        try:
            yield from _TABLES[kind_of(file.path)](file, source, self._reader.open)
        except RecipeError as error:
            if error.field != "source.url":
                raise
            hint = f"add the column {FILE_NAME}, or move the file out of the folder of images"
            raise RecipeError("source.path", error.problem, hint) from None

    def _files(self) -> Batches:
        """Return all files, in batches. Those in a bucket, or at several paths, are listed once and held."""
        if self.source.format == "world":
            return iter(())
        if len(self._paths) == 1 and "://" not in self._paths[0]:
            return self._listed(self._paths[0])
        if not self._gathered:
            files = {file.path: file for path in self._paths for file in self._requested(path)}
            self._gathered = list(files.values())
        return in_batches(self._gathered)

    def _requested(self, path: str) -> list[SourceFile]:
        """Return the files of one of several paths. Parquet files at a path without tars count as named by the user."""
        files = [file for batch in self._listed(path) for file in batch]
        if "webdataset" in self._kinds[path].formats:
            return files
        return [replace(file, named=True) if kind_of(file.path) == "parquet" else file for file in files]

    def _listed(self, path: str) -> Batches:
        kinds, outside = FormatGuess(path, self._suffixes), list[str]()
        for batch in list_files(path, options_of(path, self._recipe)):
            inside = [file for file in batch if not file.outside]
            outside += [file.path for file in batch if file.outside]
            kinds.note(inside)
            yield inside
        self._kinds[path] = kinds
        if outside and path not in self._outside:
            message = (
                "source: %d links to texts outside %s are not read, the first is %s. Fix: copy the files themselves"
            )
            log.warning(message, len(outside), path, outside[0])
        self._outside[path] = len(outside)

    def _signature(self) -> str:
        """Return 16 hexadecimal digits: a hash of the recipe's source and its files' paths, sizes and stamps."""
        digest = hashlib.blake2b(digest_size=8)
        settings = json.dumps(self.source.model_dump(mode="json", exclude={"storage"}), sort_keys=True)
        digest.update(settings.encode())
        for batch in self._files():
            digest.update(json.dumps([(file.path, file.size, file.stamp) for file in batch]).encode())
        return digest.hexdigest()

    def _read_all(self, files: list[SourceFile]) -> dict[str, bytes]:
        spans = [Span(file.path, 0, file.size, number) for number, file in enumerate(files)]
        content = {}
        for number, data in read_images(spans, self._recipe):
            if isinstance(data, CapstanError):
                raise data
            if isinstance(data, Exception):
                raise OSError(f"{files[number].path}: {data}")
            content[files[number].path] = data
        return content


def _guarded(tables_: Iterator[pa.Table], path: str) -> Iterator[pa.Table]:
    """Yield the reader's tables; re-raise read errors as RecipeError."""
    with _reading(path):
        yield from tables_


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, pa.ArrowException, lzma.LZMAError, csv.Error) as error:
        hint = "check that it is complete, or leave it out of the source"
        raise RecipeError("source.path", f"{path} cannot be read ({error})", hint) from None


def _in_tables(rows: Iterable[Row]) -> Iterator[pa.Table]:
    held: list[Row] = []
    size = 0
    for row in rows:
        held.append(row)
        size += len(row.caption) + len(row.extra)
        if len(held) == _BATCH_ROWS or size >= _BATCH_BYTES:
            yield of_rows(held)
            held, size = [], 0
    if held:
        yield of_rows(held)


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, len(table), _BATCH_ROWS):
        yield table.slice(start, _BATCH_ROWS)


def _world(source: Source) -> Iterator[Row]:
    from capstan.pipeline.world import table
    from capstan.pipeline.world.moving import table as moving

    world = source.world or WorldSource()
    for record in (table if world.moving is None else moving).rows(world):
        yield Row(url=record.pop("url"), caption=record.pop("caption"), extra=to_json(record))
