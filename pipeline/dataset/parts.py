"""Further files of a sample, next to its image: a clip's video and its sound

Where a recipe names them (`source.parts`), they follow the image in every tar. Staged and shard tables have for each
part `<part>_offset`, `<part>_size` (0: the sample has none) and `<part>_crc32`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, Final, NamedTuple

import pyarrow as pa

from capstan.pipeline.errors import DamagedFile

PARTS: Final = ("mp4", "flac")  # in this order in a tar
_STARTS: Final = {"mp4": (4, b"ftyp"), "flac": (0, b"fLaC")}  # offset and bytes by which a file is known


class PartPlace(NamedTuple):
    """The position of a part's bytes in a tar, and their CRC-32."""

    offset: int = 0
    size: int = 0
    crc32: int = 0


def part_fields(parts: Iterable[str]) -> list[pa.Field]:
    """Return the columns of these parts."""
    kinds = {"offset": pa.int64(), "size": pa.int64(), "crc32": pa.uint32()}
    return [pa.field(f"{part}_{name}", kind, nullable=False) for part in parts for name, kind in kinds.items()]


def part_names(columns: Iterable[str]) -> list[str]:
    """Return those of a table's columns that tell where parts are, in their order."""
    known = {field.name for field in part_fields(PARTS)}
    return [name for name in columns if name in known]


def parts_in(columns: Iterable[str]) -> list[str]:
    """Return the parts that a table has columns of."""
    there = set(columns)
    return [part for part in PARTS if f"{part}_size" in there]


def part_columns(places: Sequence[Mapping[str, PartPlace]], parts: Iterable[str]) -> dict[str, pa.Array]:
    """Return the columns of these parts; `places` has the parts of each row."""
    return {
        field.name: pa.array(
            [getattr(row.get(part, PartPlace()), field.name.removeprefix(f"{part}_")) for row in places], field.type
        )
        for part in parts
        for field in part_fields([part])
    }


def read_parts(tar: BinaryIO, row: Mapping[str, Any], name: str) -> dict[str, bytes]:
    """Return the parts of a row of a staged or shard table, by suffix, and compare them with what was written.

    Raises DamagedFile naming the tar `name`.
    """
    found = {}
    for part in parts_in(row):
        if not (size := row[f"{part}_size"]):
            continue
        tar.seek(row[f"{part}_offset"])
        data = tar.read(size)
        if len(data) != size or zlib.crc32(data) != row[f"{part}_crc32"]:
            raise DamagedFile(name, f"a {part} is not what was written")
        found[part] = data
    return found


def is_part(suffix: str, data: bytes) -> bool:
    """Return whether a file starts as one of this kind does."""
    at, start = _STARTS[suffix]
    return data[at : at + len(start)] == start
