"""Parquet, CSV, TSV, JSON Lines and text files → tables of rows

Files are streamed in bounded memory; text may be compressed as .gz, .zst, .bz2 or .xz. Work is done by columns where
possible. Ragged lines, lines that are not JSON and text that is not UTF-8 are processed one by one; each becomes a row.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from capstan.pipeline.config import Source
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source.carried import carried_columns, carried_fields, is_carried
from capstan.pipeline.source.columns import (
    UNREADABLE,
    Row,
    as_hash,
    as_objects,
    as_text,
    caption_of,
    decoded,
    of_rows,
    of_urls,
    one_of,
    text_of,
    to_json,
    unlisted,
)
from capstan.pipeline.source.table_checks import (
    Open,
    check_columns,
    check_types,
    dialect,
    header,
    lines_of,
    refuse_images,
    rows_at_once,
    unpacked,
)
from capstan.pipeline.storage.listing import SourceFile

log = logging.getLogger(__name__)

BATCH_ROWS = 1 << 15
IMAGE_ROWS = 1 << 8
BATCH_BYTES = 16 << 20
BLOCK_BYTES = 4 << 20  # text read at once
LINE_CHARACTERS = 64 << 20  # a longer line of JSON or text is refused
CELL_BYTES = 128 << 10  # a longer CSV cell is treated as an unclosed quote

Reader = Callable[[SourceFile, Source, Open], Iterator[pa.Table]]


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
        check_columns(source, table.schema_arrow.names, file)
        check_types(source, table.schema_arrow, file)
        names = carried_columns(table, source)
        most = IMAGE_ROWS if source.image else BATCH_ROWS
        at_once = min(rows_at_once(stream, table.metadata, names), _mean_rows(table.metadata))
        for batch in _regrouped(table.iter_batches(batch_size=at_once, columns=names), most):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            for key, column in _meant(source):
                if column in columns:
                    columns[column] = _single(columns[column], key, column, file)
            yield _with_images(columns, source) if source.image else _with_urls(columns, len(batch), source)


def _is_extra(name: str, source: Source) -> bool:
    """Return whether a column that was read is carried: only the checksums may have been read for another use."""
    return name != source.hash or is_carried(name, source)


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


def _mean_rows(metadata: pq.FileMetaData) -> int:
    """Return the number of rows that fit in BATCH_BYTES, from the file's largest mean row size."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
    return max(1, int(BATCH_BYTES / max(1, row_bytes)))


def _regrouped(batches: Iterator[pa.RecordBatch], most: int) -> Iterator[pa.RecordBatch]:
    """Yield the same rows in batches of up to `most` rows and about BATCH_BYTES."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        fit = max(1, min(most, len(batch) * BATCH_BYTES // max(1, batch.nbytes)))
        for start in range(0, len(batch), fit):
            part = batch.slice(start, fit)
            if held and (rows + len(part) > most or size + part.nbytes > BATCH_BYTES):
                yield from pa.Table.from_batches(held).combine_chunks().to_batches()
                held, rows, size = [], 0, 0
            held.append(part)
            rows, size = rows + len(part), size + part.nbytes
    if held:
        yield from pa.Table.from_batches(held).combine_chunks().to_batches()


def _with_urls(columns: dict[str, pa.Array], count: int, source: Source) -> pa.Table:
    hash_ = as_hash(columns[source.hash]) if source.hash else pa.repeat("", count)
    used = (source.url, source.caption)
    rest = {name: column for name, column in columns.items() if name not in used and _is_extra(name, source)}
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
    rest = {name: column for name, column in columns.items() if _is_extra(name, source)}
    extra = as_objects(rest, count).to_pylist()
    return of_rows([Row(url[n], caption[n], _embedded(cells[n]), extra=extra[n], hash=hashes[n]) for n in range(count)])


def _embedded(cell: Any) -> bytes:
    """Return the bytes in a cell; b"" if there are none: the row will fail as `empty`."""
    value = cell.get("bytes") if isinstance(cell, Mapping) else cell
    value = decoded(value) if isinstance(value, str) else value
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else b""


def separated(kind: str) -> Reader:
    """Return a reader of "csv" or "tsv", whose first line names the columns; quoted as in RFC 4180, or not at all."""

    def read(file: SourceFile, source: Source, open_: Open) -> Iterator[pa.Table]:
        refuse_images(source, file)
        how = dialect(kind, source)
        names = header(file, open_, how)
        check_columns(source, names, file)
        ragged: list[str] = []
        with unpacked(open_(file.path), file.path) as stream:
            first, in_quotes = True, 0
            for batch in _batches(stream, how, len(names), ragged, file):
                rows = batch.slice(1) if first else batch  # the header
                first = False
                columns = dict(zip(names, map(as_text, rows.columns), strict=True))
                columns = _wanted(columns, source)
                if how["quoting"] == csv.QUOTE_NONE:
                    in_quotes += sum(_in_quotes(column) for column in columns.values())
                yield _with_urls(columns, len(rows), source)
                yield from _ragged(ragged, names, how, source)
            yield from _ragged(ragged, names, how, source)
        if in_quotes:
            text = "source: %d cells of %s are in quotes, which are kept; set source.quoted: true if they only enclose"
            log.warning(text, in_quotes, file.path)

    return read


def _wanted(columns: dict[str, pa.Array], source: Source) -> dict[str, pa.Array]:
    needed = (source.url, source.caption, source.hash)
    return {name: column for name, column in columns.items() if name in needed or is_carried(name, source)}


def _in_quotes(column: pa.Array) -> int:
    """Return how many cells look as if quotes enclosed them."""
    return pc.sum(pc.match_substring_regex(column, '(?s)^"([^"]|"")*"$')).as_py() or 0


class _Text:
    """A binary file as UTF-8: invalid bytes become replacement characters.

    No read ends after a carriage return: Arrow drops a line feed at the start of a block after one, even in quotes.
    """

    closed = False

    def __init__(self, raw: Any) -> None:
        self._raw, self._decoder = raw, codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self._ended = b"", False

    def read(self, size: int) -> bytes:
        while len(self._held) <= size and not self._ended:
            data = self._raw.read(size)
            self._ended = not data
            self._held += self._decoder.decode(data, final=self._ended).encode()
        stop = size
        while stop > 1 and len(self._held) > stop and self._held[stop - 1 : stop] == b"\r":
            stop -= 1
        block, self._held = self._held[:stop], self._held[stop:]
        return block


def _batches(
    stream: Any, how: dict[str, Any], count: int, ragged: list[str], file: SourceFile
) -> Iterator[pa.RecordBatch]:
    """Yield all lines as columns of text; those without `count` cells are appended to `ragged` unchanged."""

    def set_aside(row: Any) -> str:
        ragged.append(row.text)
        return "skip"

    quoted = how["quoting"] != csv.QUOTE_NONE
    hint = "check the file for a quote that is not closed" if quoted else "check that the file is text"
    parse = pyarrow.csv.ParseOptions(
        delimiter=how["delimiter"],
        quote_char='"' if quoted else False,
        newlines_in_values=quoted,
        invalid_row_handler=set_aside,
    )
    try:
        for batch in pyarrow.csv.open_csv(
            pa.PythonFile(_Text(stream), mode="r"),
            pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, autogenerate_column_names=True),
            parse,
            pyarrow.csv.ConvertOptions(column_types={f"f{number}": pa.string() for number in range(count)}),
        ):
            if any((pc.max(pc.binary_length(column)).as_py() or 0) > CELL_BYTES for column in batch.columns):
                raise RecipeError("source.path", f"{file.path} has a cell of over {CELL_BYTES} bytes", hint)
            yield batch
    except pa.ArrowInvalid as error:
        raise RecipeError("source.path", f"{file.path} cannot be read ({error})", hint) from None


def _ragged(waiting: list[str], names: list[str], how: dict[str, Any], source: Source) -> Iterator[pa.Table]:
    """Yield the lines with too few cells (missing ones are empty) or too many (extra ones are dropped).

    Arrow's threads may still be adding to `waiting`.
    """
    lines = waiting[:]
    del waiting[: len(lines)]
    if not lines:
        return
    cells = [row + [""] * len(names) for row in csv.reader(lines, **how)]
    columns = {name: pa.array([row[place] for row in cells], pa.string()) for place, name in enumerate(names)}
    columns = _wanted(columns, source)
    yield _with_urls(columns, len(cells), source)


def jsonl(file: SourceFile, source: Source, open_: Open) -> Iterator[pa.Table]:
    """Read JSON Lines, or a JSON array. A line or item that is not an object becomes a row that fails as bad_url."""
    refuse_images(source, file)
    with lines_of(unpacked(open_(file.path), file.path)) as lines:
        array = _ARRAY.match(lines.read(_PEEK)) is not None
    with lines_of(unpacked(open_(file.path), file.path)) as lines:
        checked = False
        for records in _array_records(lines, file) if array else _line_records(lines, file):
            if not checked and (named := {name for record in records for name in record} - {UNREADABLE}):
                check_columns(source, sorted(named), file)
                checked = True
            if records:
                yield _of_records(records, source)


_ARRAY = re.compile(r"\s*\[\s*[{\]]")  # the start of an array of objects
_PEEK = 1 << 12  # characters
_WEB = re.compile(r"\s*https?://", re.IGNORECASE)


def _line_records(lines: io.TextIOWrapper, file: SourceFile) -> Iterator[list[dict[str, Any]]]:
    for block in _blocks_of(lines, file):
        yield _records([line for line in block if line.strip()])


def _blocks_of(lines: io.TextIOWrapper, file: SourceFile) -> Iterator[list[str]]:
    """Yield lists of lines. Raises RecipeError for a line that would not fit into memory."""
    rest = ""
    while more := lines.read(BLOCK_BYTES):
        *whole, rest = (rest + more).split("\n")
        if len(rest) > LINE_CHARACTERS:
            problem = f"{file.path} has a line of over {LINE_CHARACTERS} characters"
            raise RecipeError("source.path", problem, "check that it is text with one row per line")
        if whole:
            yield whole
    if rest:
        yield [rest]


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
                break  # the item continues in the next block
            records.append(value if isinstance(value, dict) else {UNREADABLE: to_json(value)})
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
    return value if isinstance(value, dict) else {UNREADABLE: line.strip()}


def _of_records(records: Sequence[dict[str, Any]], source: Source) -> pa.Table:
    nothing = itertools.repeat("", len(records))
    hashes = [text_of(record.get(source.hash)).strip() for record in records] if source.hash else nothing
    url = [text_of(one_of(record.get(source.url or ""))) for record in records]
    caption = [caption_of(record, source.caption) for record in records]
    for record in records:
        record.pop(source.url or "", None)
    columns = [url, caption, [to_json(carried_fields(record, source)) for record in records], hashes]
    return of_urls(*(pa.array(column, pa.string()) for column in columns))


def txt(file: SourceFile, source: Source, open_: Open) -> Iterator[pa.Table]:
    refuse_images(source, file)
    with lines_of(unpacked(open_(file.path), file.path)) as lines:
        for block in _blocks_of(lines, file):
            url = pc.utf8_trim_whitespace(pa.array(block, pa.string()))
            url = url.filter(pc.not_equal(url, ""))
            nothing = pa.repeat("", len(url))
            yield of_urls(url, nothing, pa.repeat("{}", len(url)), nothing)
