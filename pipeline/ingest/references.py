"""References: staged rows whose images stay where they are, in tars of the source on a disk

With `image.check: header` an image that is stored byte for byte as a tar holds it is not copied to staged/: its row
names its place (REFERENCE), and packing reads it there. So what is not kept is never written, and what is kept is
written once. The image is compared with its CRC-32 whenever it is read.

Rows of a Capstan dataset are taken over from its tables without reading their images. These are checked when they are
packed (`checked` false): their JPEG is walked, and must have the size that the table says.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.own_shards import FACTS
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.image.copied import is_copy
from capstan.pipeline.image.decode import LARGEST_SIDE
from capstan.pipeline.records import CRC32, MEASURED
from capstan.pipeline.secrets import public_url
from capstan.pipeline.source.blocklist import Blocklist
from capstan.pipeline.source.columns import NO_TEXT
from capstan.pipeline.storage.listing import on_disk

REFERENCE: Final = [
    pa.field("source", pa.string(), nullable=False),  # the tar; "": the row has no reference
    pa.field("source_offset", pa.int64(), nullable=False),
    pa.field("source_size", pa.int64(), nullable=False),
    pa.field("source_crc32", pa.uint32(), nullable=False),
    pa.field("source_checked", pa.bool_(), nullable=False),  # whether the image was read when the row was staged
]
REFERENCE_NAMES: Final = [field.name for field in REFERENCE]
_NONE: Final = dict(zip(REFERENCE_NAMES, ("", 0, 0, 0, False), strict=True))
_OPEN: Final = 64  # tars that a reader holds open
_AHEAD: Final = 8  # images announced to the operating system in advance


def moved(table: str) -> str:
    """Return the name under which damage to the images that a staged table refers to is noted."""
    return f"{table}#source"


def refer(row: Mapping[str, Any], data: bytes) -> dict[str, Any]:
    """Return the reference of a planned row to its image `data`; {} if that is not in a tar on a disk."""
    if not row["file"] or not row["offset"] or on_disk(row["file"]) is None:
        return {}
    values = (row["file"], row["offset"], row["length"], zlib.crc32(data), True)
    return dict(zip(REFERENCE_NAMES, values, strict=True))


def with_references(table: pa.Table, outcomes: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Append the columns of REFERENCE to a staged table, if any of the rows' outcomes has a reference."""
    if any(outcome.get("source") for outcome in outcomes):
        for field in REFERENCE:
            values = [outcome.get(field.name, _NONE[field.name]) for outcome in outcomes]
            table = table.append_column(field, pa.array(values, field.type))
    return table


def without_references(table: pa.Table, rows: pa.ChunkedArray) -> pa.Table:
    """Remove the references of the rows where `rows` is true."""
    for number, name in enumerate(table.column_names):
        if name in _NONE:
            column = pc.if_else(rows, pa.scalar(_NONE[name], table.schema.types[number]), table[name])
            table = table.set_column(number, table.schema.field(name), column)
    return table


def is_there(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Return for each row of a staged table whether the tar that it refers to is there, and long enough."""
    if "source" not in table.column_names:
        return np.zeros(len(table), bool)
    sizes = {source: _size(source) for source in table["source"].unique().to_pylist()}
    index = pc.index_in(table["source"], pa.array(list(sizes), pa.string())).to_numpy()
    have = np.fromiter(sizes.values(), np.int64, len(sizes))[index]
    stop = table["source_offset"].to_numpy() + table["source_size"].to_numpy()
    return np.asarray((stop <= have) & (stop > 0))


def _size(source: str) -> int:
    try:
        return os.stat(on_disk(source) or source).st_size if source else -1  # noqa: PTH116 - not UTF-8
    except OSError:
        return -1


# Rows of Capstan's shards -------------------------------------------------------------------------------------------


def taken_over(
    planned: pa.Table, recipe: Recipe, unwanted: Blocklist, unit: str
) -> tuple[npt.NDArray[np.bool_], pa.Table | None]:
    """Return which planned rows need not be read, and these as staged rows with references (None: there are none).

    These are rows of Capstan's shards that meet the recipe's limits and are not blocked. All that is known of them is
    taken from the shards' tables.
    """
    known = _has_facts(planned, recipe)
    if not known.any():
        return known, None
    facts = _facts(planned.filter(pa.array(known)))
    width, height = (facts[name].to_numpy().astype(np.int64) for name in ("width", "height"))
    fits = (width * height <= recipe.image.max_pixels) & (np.minimum(width, height) >= recipe.image.min_size)
    fits &= (np.maximum(width, height) <= LARGEST_SIDE) & facts[CRC32.name].is_valid().to_numpy()
    if unwanted.sha256:
        fits &= ~pc.is_in(facts["sha256"], pa.array(sorted(unwanted.sha256), pa.string())).to_numpy()
    known[known] = fits
    if not fits.any():
        return known, None
    return known, _staged(planned.filter(pa.array(known)), facts.filter(pa.array(fits)), unit)


def _has_facts(planned: pa.Table, recipe: Recipe) -> npt.NDArray[np.bool_]:
    """Return the rows that are samples of Capstan's shards in tars on a disk."""
    files = [file for file in planned["file"].unique().to_pylist() if file and on_disk(file) is not None]
    masks = [
        pc.not_equal(planned["facts"], ""),
        pc.equal(planned["hash"], ""),  # neither to be compared, nor taken down
        pc.greater(planned["offset"], 0),
        pc.less_equal(planned["length"], recipe.fetch.max_bytes),
        pc.greater(planned["length"], 0),
        pc.invert(pc.match_substring(planned["extra"], f'"{NO_TEXT}":')),
        pc.is_in(planned["file"], pa.array(files, pa.string())),
    ]
    return np.logical_and.reduce([mask.to_numpy() for mask in masks])


def _facts(planned: pa.Table) -> pa.Table:
    """Parse the column `facts`: MEASURED and CRC32 of each row."""
    rows = json.loads(f"[{','.join(planned['facts'].to_pylist())}]")
    schema = pa.schema([*MEASURED, CRC32])
    assert set(schema.names) == set(FACTS)
    return pa.Table.from_pylist(rows, schema)


def _staged(planned: pa.Table, facts: pa.Table, unit: str) -> pa.Table:
    """Return rows of STAGED_SCHEMA and REFERENCE; `ingest.job` puts the columns in their order."""
    count = len(planned)
    columns = {name: planned[name] for name in ("key", "caption", "extra")}
    columns["url"] = pa.array([public_url(url) for url in planned["url"].to_pylist()], pa.string())
    columns |= {name: pa.repeat("", count) for name in ("reason", "detail")}
    columns |= {field.name: facts[field.name] for field in MEASURED}
    columns["unit"] = pa.repeat(unit, count)
    columns |= {name: pa.repeat(pa.scalar(0, pa.int64()), count) for name in ("offset", "size")}
    columns[CRC32.name] = pa.nulls(count, CRC32.type)
    values = (planned["file"], planned["offset"], planned["length"], facts[CRC32.name], pa.repeat(False, count))
    return pa.table(columns | dict(zip(REFERENCE_NAMES, values, strict=True)))


def merged(known: pa.Table, read: pa.Table, mask: npt.NDArray[np.bool_]) -> pa.Table:
    """Return the rows of both staged tables in their order: where `mask` is true, those of `known`."""
    for field in REFERENCE if "source" not in read.column_names else ():
        values = pa.repeat(pa.scalar(_NONE[field.name], field.type), len(read))
        read = read.append_column(field, values)
    both = pa.concat_tables([known.select(read.column_names).cast(read.schema), read])
    return both.take(pa.array(np.argsort(np.argsort(~mask, kind="stable"), kind="stable")))


# Reading -------------------------------------------------------------------------------------------------------------


class SourceTars:
    """The tars that staged rows refer to; a few are held open."""

    def __init__(self) -> None:
        self._open = OrderedDict[str, int]()

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def announced(self, places: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Yield the same rows; the operating system learns early which images will be read."""
        ahead = iter(places)
        window = list(islice(ahead, _AHEAD))
        for place in window:
            self._announce(place)
        for place in ahead:
            self._announce(place)
            window.append(place)
            yield window.pop(0)
        yield from window

    def read(self, place: Mapping[str, Any]) -> bytes:
        """Return the image of a staged row that has a reference. Raises DamagedFile if it is not what the row says."""
        name, size = place["source"], place["source_size"]
        try:
            data = os.pread(self._file(name), size, place["source_offset"])
        except OSError as error:
            raise DamagedFile(name, f"cannot be read ({error.strerror})") from None
        if len(data) != size or zlib.crc32(data) != place["source_crc32"]:
            raise DamagedFile(name, f"it has changed: {place['key']} is not what its table says")
        if not place["source_checked"] and not is_copy(data, place["width"], place["height"]):
            raise DamagedFile(name, f"the JPEG of {place['key']} is damaged, or not what its table says")
        return data

    def _announce(self, place: Mapping[str, Any]) -> None:
        if place.get("source") and hasattr(os, "posix_fadvise"):
            try:
                handle = self._file(place["source"])
                os.posix_fadvise(handle, place["source_offset"], place["source_size"], os.POSIX_FADV_WILLNEED)
            except OSError:
                return  # reading it says why

    def _file(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        while len(self._open) >= _OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[name] = os.open(on_disk(name) or name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        return self._open[name]
