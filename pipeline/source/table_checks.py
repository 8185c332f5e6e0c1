"""Columns, types and encoding of tables: checked before a row is read"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import io
import lzma
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from capstan.pipeline.config import Source
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source.columns import is_list, is_nested, is_words
from capstan.pipeline.storage.listing import SourceFile

UNPACKED: Final = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
DELIMITERS: Final = {"csv": ",", "tsv": "\t"}

_HEADER_CHARACTERS: Final = 1 << 20
_ROWS_AT_ONCE: Final = 256  # with 128, reading a table takes half as long again
_BYTES_AT_ONCE: Final = 256 << 20  # 256 rows of the 1 MiB that writers' dictionaries have at most
_PAGE_HEADER: Final = 32  # bytes of a page's header that hold its kind and size
_NEXT_I32: Final = 0x15  # the next field of a Thrift struct, an i32
_DICTIONARY: Final = 2  # PageType.DICTIONARY_PAGE

Open = Callable[..., Any]


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


def check(kind: str, file: SourceFile, source: Source, open_: Open) -> int | None:
    """Raise RecipeError for a file whose columns, types or encoding cannot be right; read no row of it.

    Return the number of its rows, None if it does not say.
    """
    if kind == "parquet":
        with open_(file.path, ahead=False) as stream, contextlib.suppress(pa.ArrowInvalid):  # which reading reports
            metadata = pq.read_metadata(stream)
            if metadata.num_rows:
                schema = metadata.schema.to_arrow_schema()
                check_columns(source, schema.names, file)
                check_types(source, schema, file)
            return int(metadata.num_rows)
        return None
    with unpacked(open_(file.path, ahead=False), file.path) as stream:
        head = stream.read(4)
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in (head[:1], head[1:2]):
        hint = f"convert it: iconv -f UTF-16 -t UTF-8 {PurePosixPath(file.path).name} > NEW_FILE"
        raise RecipeError("source.path", f"{file.path} is UTF-16, not UTF-8", hint)
    refuse_images(source, file)
    if kind in DELIMITERS:
        check_columns(source, header(file, open_, dialect(kind, source)), file)
    return None


def dialect(kind: str, source: Source) -> dict[str, Any]:
    """Return the arguments of csv.reader for a format: TSV has no quotes unless the recipe says so."""
    quoted = kind == "csv" if source.quoted is None else source.quoted
    return {"delimiter": DELIMITERS[kind], "quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}


def header(file: SourceFile, open_: Open, how: dict[str, Any]) -> list[str]:
    """Return the names in the first line of a CSV or TSV file."""
    with lines_of(unpacked(open_(file.path), file.path), newline="") as lines:
        bounded = iter(lambda: lines.readline(_HEADER_CHARACTERS), "")  # csv refuses a cell that long
        return next(csv.reader(bounded, **how), [])


def lines_of(stream: Any, newline: str | None = None) -> io.TextIOWrapper:
    """Return a UTF-8 reader that skips a byte order mark; closing it closes `stream`."""
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=newline)


def refuse_images(source: Source, file: SourceFile) -> None:
    if source.image:
        hint = "remove source.image: only Parquet can hold images"
        raise RecipeError("source.image", f"{file.path} cannot hold embedded images", hint)


def check_columns(source: Source, names: list[str], file: SourceFile) -> None:
    """Raise RecipeError for a column that the recipe names and the table does not have."""
    if source.image is None and source.url is None:
        raise RecipeError(
            "source.url", f"is null, and {file.path} is a table", "name the column with the URLs or the images"
        )
    wanted: list[tuple[str, str | None]] = [("image", source.image) if source.image else ("url", source.url)]
    wanted += [("caption", source.caption), ("hash", source.hash)]
    wanted += [("license", source.license if isinstance(source.license, str) else None)]
    if isinstance(source.columns, list):  # a glob may match nothing
        wanted += [("columns", name) for name in source.columns if not set(name) & set("!*?[")]
    for key, column in wanted:
        if column is not None and column not in names:
            near = _nearest(column, names)
            hint = f"did you mean {near}?" if near else "set it to one of these columns"
            columns = ", ".join(names[:20])
            raise RecipeError(f"source.{key}", f"no column {column!r} in {file.path} (it has: {columns})", hint)


def check_types(source: Source, schema: pa.Schema, file: SourceFile) -> None:
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


# Memory --------------------------------------------------------------------------------------------------------------


def rows_at_once(stream: Any, metadata: pq.FileMetaData, names: Sequence[str]) -> int:
    """Return how many rows of these columns may be decoded at once.

    A text that a column repeats is stored once, so the size of a file says nothing of its rows: 60 kB may be 2 GB. But
    no value is larger than its column's dictionary, or, if values are stored as what is new in each, than the column.
    """
    largest = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns):
            chunk = group.column(place)
            if chunk.physical_type == "BYTE_ARRAY" and chunk.path_in_schema.partition(".")[0] in names:
                largest = max(largest, _largest_repeated(stream, chunk))
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // largest))


def _largest_repeated(stream: Any, chunk: pq.ColumnChunkMetaData) -> int:
    """Return a bound in bytes on a value that a column chunk stores once for several rows."""
    size = int(chunk.total_uncompressed_size)
    if size <= _BYTES_AT_ONCE // _ROWS_AT_ONCE or "DELTA_BYTE_ARRAY" in chunk.encodings:
        return size
    stream.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
    kind, page = _page(stream.read(_PAGE_HEADER))
    return min(size, page) if kind == _DICTIONARY else 1


def _page(header: bytes) -> tuple[int, int]:
    """Return kind and uncompressed bytes of a page, the first fields of its header (Thrift's compact protocol)."""
    values, data = list[int](), iter(header)
    with contextlib.suppress(StopIteration):
        while len(values) < 2 and next(data) == _NEXT_I32:
            value = shift = 0
            while True:
                byte = next(data)
                value |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            values.append(value >> 1)  # zigzag, and never negative here
    return (values[0], values[1]) if len(values) == 2 else (-1, 0)
