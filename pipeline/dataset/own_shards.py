"""A shard of a Capstan dataset as a source: what the table next to the tar says of its images

With `image.check: header` pixels are not decoded, so hashes that need them are taken over from there, with all that was
measured of the original file. Columns of scores go into `extra`. A table that does not fit its tar says nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capstan.pipeline.dataset.energon import layout
from capstan.pipeline.dataset.parts import part_names
from capstan.pipeline.dataset.shards import tar_end
from capstan.pipeline.records import CRC32, MEASURED, SHARD_SCHEMA

FACTS: Final = [*(field.name for field in MEASURED), CRC32.name]
_FORMS: Final = {"key": "[0-9a-f]{32}", "sha256": "[0-9a-f]{64}", "colours": "([A-Za-z0-9+/]{64})?"}
_COUNTS: Final = ("original_width", "original_height", "bytes", "offset", "size", "json_size")
Own = tuple[str, dict[str, Any]]  # facts as JSON (see PLAN_SCHEMA), and scores


def own_table(tar: str, size: int, open_: Callable[[str], Any]) -> pa.Table | None:
    """Return the table of a shard of `size` bytes; None if there is none, or if it cannot be the tar's.

    It has the columns of SHARD_SCHEMA, and its samples fill the tar to the last byte.
    """
    try:
        with open_(f"{tar.removesuffix('.tar')}.parquet") as file:
            data = file.read()
        table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read().combine_chunks()
        if not {*SHARD_SCHEMA.names} <= {*table.column_names}:
            return None
        own = table.select(SHARD_SCHEMA.names)
        if own.schema.types != SHARD_SCHEMA.types:
            return None
        table.validate(full=True)
    except (OSError, pa.ArrowException):
        return None
    return table if len(table) and _is_sound(own) and _fills(table, size) else None


def _is_sound(own: pa.Table) -> bool:
    """Return whether the cells have the form that Capstan writes: a stranger may have written the table."""
    if any(own[field.name].null_count for field in SHARD_SCHEMA if field.name != CRC32.name):
        return False
    forms = [pc.all(pc.match_substring_regex(own[name], rf"\A{form}\z")).as_py() for name, form in _FORMS.items()]
    counts = [pc.min(own[name]).as_py() >= 0 for name in _COUNTS]
    sides = [pc.min(own[name]).as_py() > 0 for name in ("width", "height")]
    return all((*forms, *counts, *sides)) and pc.count_distinct(own["key"]).as_py() == len(own)


def _fills(table: pa.Table, size: int) -> bool:
    """Return whether the samples follow each other from the tar's first byte to its end marker."""
    start, _, end = layout(table)
    last = int(end[-1])
    return start[0] == 0 and np.array_equal(start[1:], end[:-1]) and size == last + len(tar_end(last))


def score_columns(table: pa.Table) -> list[str]:
    """Return the columns that a shard's table has besides those of all shards."""
    places = part_names(table.column_names)
    return [name for name in table.column_names if name not in (*SHARD_SCHEMA.names, *places)]


def own_rows(table: pa.Table) -> dict[int, Own]:
    """Return what is known of the images of a shard by their offsets."""
    facts, others = table.select(FACTS).to_pylist(), table.select(score_columns(table)).to_pylist()
    offsets = table["offset"].to_pylist()
    return {offset: (json.dumps(fact), other) for offset, fact, other in zip(offsets, facts, others, strict=True)}


def measured(facts: str | None, crc32: int) -> dict[str, Any] | None:
    """Return what was measured of an image, None if nothing is known or its bytes (`crc32`) are not those measured."""
    if not facts:
        return None
    known: dict[str, Any] = json.loads(facts)
    return known if known.pop(CRC32.name) == crc32 else None
