"""Rows → their images, from shards or staged tars, and thumbnails in a budget

A row whose image was freed, or is in an unreadable file, has no image; the page says so.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from capstan.pipeline.dataset.parts import PARTS, part_fields, part_names, read_parts
from capstan.pipeline.dataset.shards import read_image
from capstan.pipeline.errors import DamagedFile, StorageError
from capstan.pipeline.records import KEPT
from capstan.pipeline.report.query import Row, Rows
from capstan.pipeline.storage import Storage

# Longest side in pixels, and JPEG quality: the first pair with which all thumbnails fit is used. The page shows them at
# about half their size, so the large ones are sharp on high-density screens.
_LADDER: Final = ((256, 84), (208, 80), (160, 78), (128, 74), (96, 70), (64, 60))


def find_images(rows: Rows, wanted: Iterable[Row]) -> dict[str, bytes]:
    """Return key → JPEG for the rows whose image exists."""
    found: dict[str, bytes] = {}
    for (table, tar), keys in sorted(_places(rows, wanted).items()):
        found |= _read(rows.storage, table, tar, sorted(set(keys)))
    return found


def find_parts(rows: Rows, wanted: Iterable[Row]) -> dict[str, dict[str, bytes]]:
    """Return key → the other files of the sample by suffix (a clip's video and sound), for rows that have any."""
    found: dict[str, dict[str, bytes]] = {}
    for (table, tar), keys in sorted(_places(rows, wanted).items()):
        with contextlib.suppress(FileNotFoundError, StorageError, DamagedFile):  # as for images
            places = rows.storage.read_table(table, ["key", *(field.name for field in part_fields(PARTS))])
            if not part_names(places.column_names):
                continue
            places = places.filter(pc.is_in(places["key"], pa.array(sorted(set(keys)), pa.string())))
            with rows.storage.open(tar) as file:
                for place in places.to_pylist():
                    if parts := read_parts(file, place, tar):
                        found[place["key"]] = parts
    return found


def _places(rows: Rows, wanted: Iterable[Row]) -> dict[tuple[str, str], list[str]]:
    """Return (table, tar) → keys of the rows that may have an image there."""
    places: dict[tuple[str, str], list[str]] = {}
    listed = {entry.name: entry for entry in rows.manifest.shards} if rows.manifest else {}
    for row in wanted:
        if not row.is_shown:
            files = []
        elif row.outcome == KEPT:
            files = [(listed[row.shard].table, listed[row.shard].tar)] if row.shard in listed else []
        else:
            files = [(unit.table, unit.tar) for unit in rows.staged_units(row.unit) if unit.tar]
        for place in files:
            places.setdefault(place, []).append(row.key)
    return places


def why_missing(row: Row) -> str:
    """Return in a few words why a row has no image."""
    if not row.is_shown:
        return row.reason or row.outcome
    return "cannot be read" if row.outcome == KEPT else "no longer staged"


def _read(storage: Storage, table: str, tar: str, keys: list[str]) -> dict[str, bytes]:
    """Read the JPEGs of `keys` from one tar, by the offsets in its table."""
    found: dict[str, bytes] = {}
    try:
        spans = storage.read_table(table, ["key", "offset", "size", "crc32"])
        spans = spans.filter(pc.is_in(spans["key"], pa.array(keys, pa.string()))).sort_by("offset")
        with storage.open(tar) as file:
            for row in spans.to_pylist():
                if row["size"]:
                    jpeg = read_image(file, row["offset"], row["size"], row.get("crc32"), tar)
                    found[row["key"]] = jpeg
    except (FileNotFoundError, StorageError, DamagedFile):
        pass  # freed or damaged: `capstan verify` reports damage
    return found


def shrink(jpeg: bytes, side: int) -> Image.Image | None:
    """Decode a JPEG to at most `side` pixels on its longest side; None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            image.draft("RGB", (2 * side, 2 * side))
            small = image.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=None)
    return small


def thumbnails(jpegs: Mapping[str, bytes], budget: int) -> dict[str, bytes]:
    """Return key → small JPEG, at most `budget` bytes in total. Images that do not fit are omitted."""
    largest = {key: shrink(jpeg, _LADDER[0][0]) for key, jpeg in jpegs.items()}
    whole = {key: image for key, image in largest.items() if image is not None}
    made: dict[str, bytes] = {}
    for side, quality in _LADDER:
        made = {key: _encode(image, side, quality) for key, image in whole.items()}
        if sum(map(len, made.values())) <= budget:
            return made
    return _first(made, list(jpegs), budget)


def _encode(image: Image.Image, side: int, quality: int) -> bytes:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return file.getvalue()


def _first(made: Mapping[str, bytes], order: Sequence[str], budget: int) -> dict[str, bytes]:
    chosen: dict[str, bytes] = {}
    for key in order:
        if key in made and budget >= len(made[key]):
            chosen[key] = made[key]
            budget -= len(made[key])
    return chosen
