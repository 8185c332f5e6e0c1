"""A shard of a Capstan dataset as a source: what the table next to the tar says of its images

With `image.check: header` pixels are not decoded, so hashes that need them are taken over from there, with all that was
measured of the original file. Columns of scores go into `extra`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from capstan.pipeline.dataset.parts import part_names
from capstan.pipeline.records import CRC32, MEASURED, SHARD_SCHEMA

_FACTS: Final = [field.name for field in MEASURED]
_LONGEST: Final = 1000  # characters of a fact; colours have 64
Own = tuple[str, dict[str, Any]]  # facts as JSON (see PLAN_SCHEMA), and scores


def own_rows(tar: str, open_: Callable[[str], Any]) -> dict[int, Own]:
    """Return what is known of the images of a tar by their offsets; {} if no shard's table is next to it."""
    try:
        with open_(f"{tar.removesuffix('.tar')}.parquet") as file:
            data = file.read()
        table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
    except (OSError, pa.ArrowException):
        return {}
    if not {*SHARD_SCHEMA.names} <= {*table.column_names}:
        return {}
    typed = table.select(SHARD_SCHEMA.names)
    if typed.schema.types != SHARD_SCHEMA.types:
        return {}
    places = part_names(table.column_names)
    scores = [name for name in table.column_names if name not in (*SHARD_SCHEMA.names, *places)]
    facts = typed.select([*_FACTS, CRC32.name]).to_pylist()
    others = table.select(scores).to_pylist()
    return {
        offset: (json.dumps(fact), other)
        for offset, fact, other in zip(table["offset"].to_pylist(), facts, others, strict=True)
        if all(len(value) <= _LONGEST for value in fact.values() if isinstance(value, str))
    }


def measured(facts: str | None, crc32: int) -> dict[str, Any] | None:
    """Return what was measured of an image, None if nothing is known or its bytes (`crc32`) are not those measured."""
    if not facts:
        return None
    known: dict[str, Any] = json.loads(facts)
    return known if known.pop(CRC32.name) == crc32 else None
