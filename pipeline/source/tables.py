"""Parquet, CSV, TSV, JSON Lines and text files → tables of rows

Files are streamed in bounded memory; text may be compressed as .gz, .zst, .bz2 or .xz. Work is done by columns where
possible. Ragged lines, lines that are not JSON and text that is not UTF-8 are processed one by one; each becomes a row.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import io
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from capstan.pipeline.config import Source
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source.columns import (
    Row,
    as_hash,
    as_objects,
    as_text,
    caption_of,
    decoded,
    is_list,
    is_nested,
    is_words,
    of_rows,
    of_urls,
    one_of,
    text_of,
    to_json,
    unlisted,
)
from capstan.pipeline.storage.listing import SourceFile

BATCH_ROWS = 1 << 15
IMAGE_ROWS = 1 << 8
BATCH_BYTES = 16 << 20
BLOCK_BYTES = 4 << 20  # text read at once
CELL_BYTES = 128 << 10  # a longer CSV cell is treated as an unclosed quote
UNPACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}

Open = Callable[..., Any]
Reader = Callable[[SourceFile, Source, Open], Iterator[pa.Table]]


def unpacked(stream: Any, path: str) -> Any:
    """Return `stream`, decompressed according to the suffix of `path`.

    Reading it raises OSError, EOFError or LZMAError if the data is cut or damaged.
    """
    codec = UNPACKED.get(PurePosixPath(path.lower()).suffix)
    if codec is None:
        return stream
    if codec == "xz":
        return lzma.open(stream)
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec)


def parquet(file: SourceFile, source: Source, open_: Open) -> Iterator[pa.Table]:
    with open_(file.path, ahead=False) as stream:  # columns are far from each other
        try:
            buffer = 8 << 20 if "://" in file.path else 1 << 20  # a column; without one, whole row groups are held
            table = pq.ParquetFile(stream, buffer_size=buffer, pre_buffer=False)
        except pa.ArrowInvalid as error:
            hint = "name a Parquet file, or set source.format"
            raise RecipeError("source.path", f"{file.path} is not Parquet ({error})", hint) from None
        if not table.metadata.num_rows:
            return  # whatever its columns are
        _check_columns(source, table.schema_arrow.names, file)
        _check_types(source, table.schema_arrow, file)
        for batch in table.iter_batches(
            batch_size=_batch_rows(table.metadata, IMAGE_ROWS if source.image else BATCH_ROWS)
        ):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            for key, column in _meant(source):
                if column in columns:
                    columns[column] = _single(columns[column], key, column, file)
            yield _with_images(columns, source) if source.image else _with_urls(columns, len(batch), source)


def _meant(source: Source) -> list[tuple[str, str]]:
    """Return (key of the recipe, column) of the columns that hold one value per row."""
    keys = {"image": source.image, "url": source.url, "caption": source.caption}
    return [(key, column) for key, column in keys.items() if column is not None]


def _single(column: pa.Array, key: str, name: str, file: SourceFile) -> pa.Array:
    try:
        return unlisted(column)
    except ValueError as error:
        hint = "name a column with one value per row, or write one"
        raise RecipeError(f"source.{key}", f"{name!r} in {file.path} holds {error}", hint) from None


def check(kind: str, file: SourceFile, source: Source, open_: Open) -> None:
    """Raise RecipeError for a file whose columns, types or encoding cannot be right; read no row of it."""
    if kind == "parquet":
        with open_(file.path, ahead=False) as stream, contextlib.suppress(pa.ArrowInvalid):  # which reading reports
            metadata = pq.read_metadata(stream)
            if metadata.num_rows:
                schema = metadata.schema.to_arrow_schema()
                _check_columns(source, schema.names, file)
                _check_types(source, schema, file)
        return
    with unpacked(open_(file.path, ahead=False), file.path) as stream:
        head = stream.read(4)
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in (head[:1], head[1:2]):
        hint = f"convert it: iconv -f UTF-16 -t UTF-8 {PurePosixPath(file.path).name} > NEW_FILE"
        raise RecipeError("source.path", f"{file.path} is UTF-16, not UTF-8", hint)
    _refuse_images(source, file)
    if kind in _DELIMITERS:
        _check_columns(source, _header(file, _DELIMITERS[kind], open_), file)


def _batch_rows(metadata: pq.FileMetaData, most: int) -> int:
    """Return the number of rows that fit in BATCH_BYTES, from the file's largest mean row size; at most `most`.

    The mean can be too small: a value that is repeated in a column counts once.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
    return max(1, min(most, int(BATCH_BYTES / max(1, row_bytes))))


def _with_urls(columns: dict[str, pa.Array], count: int, source: Source) -> pa.Table:
    hash_ = as_hash(columns[source.hash]) if source.hash else pa.repeat("", count)
    rest = {name: column for name, column in columns.items() if name not in (source.url, source.caption)}
    url, caption = as_text(columns[source.url or ""]), as_text(columns[source.caption])
    return of_urls(url, caption, as_objects(rest, count), hash_)


def _with_images(columns: dict[str, pa.Array], source: Source) -> pa.Table:
    """Return rows with embedded images: cells of bytes, or Hugging Face's {bytes, path}, whose path goes to `extra`."""
    assert source.image is not None
    cells = columns.pop(source.image).to_pylist()
    count = len(cells)
    if any(isinstance(cell, str) and _WEB.match(cell) for cell in cells):
        hint = f"set source.url: {source.image}, and remove source.image"
        raise RecipeError("source.image", f"{source.image!r} holds URLs, not images", hint)
    names = [cell["path"] if isinstance(cell, Mapping) and cell.get("path") else None for cell in cells]
    hashes = (as_hash(columns[source.hash]) if source.hash else pa.repeat("", count)).to_pylist()
    nothing = pa.repeat("", count)
    url = (as_text(columns.pop(source.url)) if source.url in columns else nothing).to_pylist()
    caption = as_text(columns.pop(source.caption)).to_pylist()
    if any(names):
        columns[source.image] = pa.array([{"path": name} for name in names])
    extra = as_objects(columns, count).to_pylist()
    return of_rows([Row(url[n], caption[n], _embedded(cells[n]), extra=extra[n], hash=hashes[n]) for n in range(count)])


def _embedded(cell: Any) -> bytes:
    """Return the bytes in a cell; b"" if there are none: the row will fail as `empty`."""
    value = cell.get("bytes") if isinstance(cell, Mapping) else cell
    value = decoded(value) if isinstance(value, str) else value
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else b""


def separated(delimiter: str) -> Reader:
    """Return a reader of CSV with this delimiter: quoted as in RFC 4180; the first line names the columns."""

    def read(file: SourceFile, source: Source, open_: Open) -> Iterator[pa.Table]:
        _refuse_images(source, file)
        names = _header(file, delimiter, open_)
        _check_columns(source, names, file)
        ragged: list[str] = []
        with unpacked(open_(file.path), file.path) as stream:
            first = True
            for batch in _batches(stream, delimiter, len(names), ragged, file):
                rows = batch.slice(1) if first else batch  # the header
                first = False
                columns = dict(zip(names, map(as_text, rows.columns), strict=True))
                yield _with_urls(columns, len(rows), source)
                yield from _ragged(ragged, names, delimiter, source)
            yield from _ragged(ragged, names, delimiter, source)

    return read


_DELIMITERS = {"csv": ",", "tsv": "\t"}


def _header(file: SourceFile, delimiter: str, open_: Open) -> list[str]:
    with _lines(unpacked(open_(file.path), file.path), newline="") as lines:
        return next(csv.reader(lines, delimiter=delimiter), [])


def _batches(stream: Any, delimiter: str, count: int, ragged: list[str], file: SourceFile) -> Iterator[pa.RecordBatch]:
    """Yield all lines as columns of text; those without `count` cells are appended to `ragged` unchanged."""

    def set_aside(row: Any) -> str:
        ragged.append(row.text)
        return "skip"

    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    raw = stream if isinstance(stream, pa.NativeFile) else pa.PythonFile(stream, mode="r")
    valid = pa.TransformInputStream(raw, lambda data: utf8.decode(data, final=not data).encode())
    unclosed = "check the file for a quote that is not closed"
    try:
        for batch in pyarrow.csv.open_csv(
            valid,
            pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, autogenerate_column_names=True),
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=set_aside),
            pyarrow.csv.ConvertOptions(column_types={f"f{number}": pa.string() for number in range(count)}),
        ):
            if any((pc.max(pc.binary_length(column)).as_py() or 0) > CELL_BYTES for column in batch.columns):
                raise RecipeError("source.path", f"{file.path} has a cell of over {CELL_BYTES} bytes", unclosed)
            yield batch
    except pa.ArrowInvalid as error:
        raise RecipeError("source.path", f"{file.path} cannot be read ({error})", unclosed) from None


def _ragged(waiting: list[str], names: list[str], delimiter: str, source: Source) -> Iterator[pa.Table]:
    """Yield the lines with too few cells (missing ones are empty) or too many (extra ones are dropped).

    Arrow's threads may still be adding to `waiting`.
    """
    lines = waiting[:]
    del waiting[: len(lines)]
    if not lines:
        return
    cells = [row + [""] * len(names) for row in csv.reader(lines, delimiter=delimiter)]
    columns = {name: pa.array([row[place] for row in cells], pa.string()) for place, name in enumerate(names)}
    yield _with_urls(columns, len(cells), source)


def jsonl(file: SourceFile, source: Source, open_: Open) -> Iterator[pa.Table]:
    """Read JSON Lines, or a JSON array. A line or item that is not an object becomes a row that fails as bad_url."""
    _refuse_images(source, file)
    with _lines(unpacked(open_(file.path), file.path)) as lines:
        array = _ARRAY.match(lines.read(_PEEK)) is not None
    with _lines(unpacked(open_(file.path), file.path)) as lines:
        checked = False
        for records in _array_records(lines, file) if array else _line_records(lines):
            if not checked and (named := {name for record in records for name in record} - {_UNREADABLE}):
                _check_columns(source, sorted(named), file)
                checked = True
            if records:
                yield _of_records(records, source)


_UNREADABLE = "unreadable_line"
_ARRAY = re.compile(r"\s*\[\s*[{\]]")  # the start of an array of objects
_PEEK = 1 << 12  # characters
_WEB = re.compile(r"\s*https?://", re.IGNORECASE)


def _line_records(lines: io.TextIOWrapper) -> Iterator[list[dict[str, Any]]]:
    while block := lines.readlines(BLOCK_BYTES):
        yield _records([line for line in block if not line.isspace()])


def _array_records(text: io.TextIOWrapper, file: SourceFile) -> Iterator[list[dict[str, Any]]]:
    """Yield the objects of a JSON array (or of several, one after the other), in bounded memory."""
    decode = json.JSONDecoder().raw_decode
    buffer, at, inside = "", 0, False
    while True:
        more = text.read(BLOCK_BYTES)
        buffer, at, records = buffer[at:] + more, 0, list[dict[str, Any]]()
        while (start := _first(buffer, at, " \t\r\n," if inside else " \t\r\n")) < len(buffer):
            at = start
            if buffer[at] == ("]" if inside else "["):
                inside, at = not inside, at + 1
                continue
            try:
                value, at = decode(buffer, at)
            except (ValueError, RecursionError):
                break  # the item goes on in the next block
            records.append(value if isinstance(value, dict) else {_UNREADABLE: to_json(value)})
        else:
            at = len(buffer)
        if records:
            yield records
        if (not more and (inside or at < len(buffer))) or len(buffer) - at > _LARGEST_ITEM:
            problem = f"{file.path} is a JSON array that is cut or damaged"
            raise RecipeError("source.path", problem, "check that it is complete, or write one JSON object per line")
        if not more:
            return


_LARGEST_ITEM = 4 * BLOCK_BYTES  # characters


def _first(text: str, start: int, passed: str) -> int:
    while start < len(text) and text[start] in passed:
        start += 1
    return start


def _records(lines: list[str]) -> list[dict[str, Any]]:
    try:
        records = json.loads(f"[{','.join(lines)}]")  # one call is much faster than one per line
        if len(records) == len(lines) and all(isinstance(record, dict) for record in records):
            return list(records)
    except (ValueError, RecursionError):
        pass
    return [_record(line) for line in lines]


def _record(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {_UNREADABLE: line.strip()}


def _of_records(records: Sequence[dict[str, Any]], source: Source) -> pa.Table:
    nothing = itertools.repeat("", len(records))
    hashes = [text_of(record.get(source.hash)).strip() for record in records] if source.hash else nothing
    url = [text_of(one_of(record.get(source.url or ""))) for record in records]
    caption = [caption_of(record, source.caption) for record in records]
    for record in records:
        record.pop(source.url or "", None)
    columns = [url, caption, [to_json(record) for record in records], hashes]
    return of_urls(*(pa.array(column, pa.string()) for column in columns))


def txt(file: SourceFile, source: Source, open_: Open) -> Iterator[pa.Table]:
    _refuse_images(source, file)
    with _lines(unpacked(open_(file.path), file.path)) as lines:
        while block := lines.readlines(BLOCK_BYTES):
            url = pc.utf8_trim_whitespace(pa.array(block, pa.string()))
            url = url.filter(pc.not_equal(url, ""))
            nothing = pa.repeat("", len(url))
            yield of_urls(url, nothing, pa.repeat("{}", len(url)), nothing)


def _lines(stream: Any, newline: str | None = None) -> io.TextIOWrapper:
    """Return a UTF-8 reader that skips a byte order mark; closing it closes `stream`."""
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=newline)


def _refuse_images(source: Source, file: SourceFile) -> None:
    if source.image:
        hint = "remove source.image: only Parquet can hold images"
        raise RecipeError("source.image", f"{file.path} cannot hold embedded images", hint)


def _check_columns(source: Source, names: list[str], file: SourceFile) -> None:
    """Raise RecipeError for a column that the recipe names and the table does not have."""
    if source.image is None and source.url is None:
        raise RecipeError(
            "source.url", f"is null, and {file.path} is a table", "name the column with the URLs or the images"
        )
    wanted: list[tuple[str, str | None]] = [("image", source.image) if source.image else ("url", source.url)]
    wanted += [("caption", source.caption), ("hash", source.hash)]
    for key, column in wanted:
        if column is not None and column not in names:
            near = _nearest(column, names)
            hint = f"did you mean {near}?" if near else "set it to one of these columns"
            columns = ", ".join(names[:20])
            raise RecipeError(f"source.{key}", f"no column {column!r} in {file.path} (it has: {columns})", hint)


def _check_types(source: Source, schema: pa.Schema, file: SourceFile) -> None:
    """Raise RecipeError for columns whose type is not that of a URL, an image or a caption."""

    def type_of(column: str) -> pa.DataType:
        return schema.field(schema.get_all_field_indices(column)[-1]).type  # of repeated names the last is read

    caption = type_of(source.caption)
    if is_nested(caption) and not is_words(caption):
        hint = "name a column of text, or add one that holds the intended caption"
        raise RecipeError("source.caption", f"{source.caption!r} in {file.path} holds {caption}, not text", hint)
    if source.image is not None:
        kind = type_of(source.image)
        inner = kind.value_type if is_list(kind) else kind
        has_bytes = pa.types.is_struct(inner) and inner.get_field_index("bytes") >= 0
        if not has_bytes and not is_words(inner):
            hint = "name a column of bytes, of base64 text or of {bytes, path}"
            raise RecipeError("source.image", f"{source.image!r} in {file.path} holds {kind}, not images", hint)
    elif source.url is not None and not is_words(kind := type_of(source.url)):
        raise RecipeError(
            "source.url", f"{source.url!r} in {file.path} holds {kind}, not text", "name a column of URLs"
        )


def _nearest(column: str, names: list[str]) -> str:
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(column.lower(), list(lower), n=1, cutoff=0.5)
    return lower[near[0]] if near else ""
