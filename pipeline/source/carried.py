"""Which columns of a source are carried into `extra`

By default all but vectors: an embedding of 768 numbers is 15 kB of JSON per row that nobody reads.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from capstan.pipeline.config import Source
from capstan.pipeline.source.columns import NO_TEXT, UNREADABLE, is_list

log = logging.getLogger(__name__)

_VECTOR: Final = 16  # a list of more numbers is a vector; a box or a few tags are not


def is_carried(name: str, source: Source, *, vector: bool = False) -> bool:
    """Return whether a column is carried: by the last pattern of `source.columns` that matches its name.

    If there are only patterns that leave out (!glob), all others but vectors are carried. That of the licences
    (`source.license`) always is.
    """
    if name == source.license:
        return True
    if source.columns is None or source.columns == "all":
        return source.columns == "all" or not vector
    keep = bool(source.columns) and all(pattern.startswith("!") for pattern in source.columns) and not vector
    for pattern in source.columns:
        plain = pattern.removeprefix("!")
        if plain == name or fnmatchcase(name, plain):
            keep = not pattern.startswith("!")
    return keep


def carried_fields(record: dict[str, Any], source: Source) -> dict[str, Any]:
    """Return the fields of a JSON object that are carried."""
    if source.columns == "all" or (source.columns is None and not any(map(_is_vector, record.values()))):
        return record
    left = [name for name, value in record.items() if _is_vector(value) and not is_carried(name, source, vector=True)]
    for name in left:
        _note(str(source.path), name)
    marks = (NO_TEXT, UNREADABLE)
    return {
        name: value
        for name, value in record.items()
        if name in marks or is_carried(name, source, vector=_is_vector(value))
    }


def carried_columns(file: pq.ParquetFile, source: Source) -> list[str]:
    """Return the columns of a Parquet file to read: those that rows are made of, and those that are carried."""
    needed = {source.url, source.image, source.caption, source.hash}
    vectors = _vectors(file)
    names = [
        name
        for name in dict.fromkeys(file.schema_arrow.names)
        if name in needed or is_carried(name, source, vector=name in vectors)
    ]
    for name in sorted(vectors.keys() - set(names)):
        if is_carried(name, source):
            _note(str(source.path), name)
    return names


def _vectors(file: pq.ParquetFile) -> Mapping[str, int]:
    """Return the columns that hold lists of many numbers, and how many per row, by the file's metadata."""
    lists = {field.name for field in file.schema_arrow if is_list(field.type) and _is_number(field.type.value_type)}
    values, rows = dict.fromkeys(lists, 0), max(1, file.metadata.num_rows)
    for group in range(file.metadata.num_row_groups if lists else 0):
        chunks = file.metadata.row_group(group)
        for number in range(chunks.num_columns):
            chunk = chunks.column(number)
            name = next((name for name in lists if chunk.path_in_schema.startswith(f"{name}.")), None)
            if name is not None:
                values[name] += chunk.num_values
    return {name: count // rows for name, count in values.items() if count // rows > _VECTOR}


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and len(value) > _VECTOR and all(isinstance(item, int | float) for item in value)


@functools.lru_cache(maxsize=1024)
def _note(path: str, column: str) -> None:
    """Log once per source that a column is left out."""
    log.warning("source: the vectors in column %s are not carried; name it in source.columns if they should be", column)
