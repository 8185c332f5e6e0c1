"""Bounds on the text of a row, so that one cell cannot fill the memory of everything after it

A caption that is too long fails its row as `bad_caption`; other columns that are too long are left out of `extra`.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.records import PLAN_SCHEMA
from capstan.pipeline.secrets import public_url
from capstan.pipeline.source.columns import NO_TEXT, to_json

log = logging.getLogger(__name__)

MOST_TEXT: Final = 1 << 20  # bytes of a caption, of a row's other columns together, and of a file with either
MOST_URL: Final = 1 << 16  # bytes; servers refuse far shorter ones
OVERSIZED: Final = "oversized_extra"  # a field of `extra`: the bytes of what was left out
_SHOWN: Final = 200  # characters that are kept of a text that is too long


def bounded(rows: pa.Table) -> pa.Table:
    """Return rows of PLAN_SCHEMA with bounded texts. Their keys stay those of the whole texts."""
    sizes = {name: pc.binary_length(rows[name]) for name in ("caption", "extra", "url")}
    most = {"caption": MOST_TEXT, "extra": MOST_TEXT, "url": MOST_URL}
    if all((pc.max(sizes[name]).as_py() or 0) <= most[name] for name in most):
        return rows
    columns = {name: rows[name].to_pylist() for name in most}
    for index in range(len(rows)):
        caption, extra, url = (columns[name][index] for name in ("caption", "extra", "url"))
        if (size := sizes["extra"][index].as_py()) > MOST_TEXT:
            log.warning(
                "source: left out %s bytes of other columns of the row of %s", f"{size:,}", public_url(url)[:_SHOWN]
            )
            columns["extra"][index] = extra = to_json({OVERSIZED: size})
        if (size := sizes["caption"][index].as_py()) > MOST_TEXT:
            columns["caption"][index] = caption[:_SHOWN]
            columns["extra"][index] = to_json(json.loads(extra) | {NO_TEXT: too_long(size)})
        if (size := sizes["url"][index].as_py()) > MOST_URL:
            columns["url"][index] = f"{size:,} bytes: {url[:_SHOWN]}"  # no URL: the row fails as `bad_url`
    table: dict[str, Any] = {name: columns.get(name, rows[name]) for name in PLAN_SCHEMA.names}
    return pa.table(table, schema=PLAN_SCHEMA)


def too_long(size: int) -> str:
    """Return why a caption of `size` bytes is none."""
    return f"a caption of {size:,} bytes; at most {MOST_TEXT:,} are read"
