"""(world, index) → the defect of the file served there, and the scene it shows.

Everything follows from the world's seed and the index, never from the number of scenes: a larger world only adds rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from capstan.pipeline.config import WorldSource
from capstan.pipeline.world.scene import dice, pick_share

DEFECTS: Final[Mapping[str, float]] = {
    "missing": 0.04,  # status 404
    "html": 0.03,  # status 200 and a web page
    "cut": 0.03,  # the file ends early
    "tiny": 0.02,  # at most 16 pixels
    "exact_duplicate": 0.03,  # the same bytes as an earlier index
    "near_duplicate": 0.03,  # an earlier index's image, re-encoded slightly brighter or darker
    "rotated": 0.02,  # pixels turned, with the EXIF tag that turns them back: harmless if decoded correctly
}
FORMATS: Final[Mapping[str, float]] = {"png": 0.05, "webp": 0.05}  # served under a .jpg URL; all others are JPEG
_REACH: Final = 50  # how far back a duplicate's original may be


def defect(world: WorldSource, index: int) -> str | None:
    """Return the defect (`DEFECTS`) of the file at `index`; None for a sound file."""
    drawn = _drawn(world, index)
    if drawn in ("exact_duplicate", "near_duplicate") and _original(world, index) is None:
        return None
    return drawn


def shown_index(world: WorldSource, index: int) -> int:
    """Return the index of the scene that the image at `index` shows: its own, or the one that it copies."""
    if _drawn(world, index) in ("exact_duplicate", "near_duplicate"):
        original = _original(world, index)
        return index if original is None else original
    return index


def file_format(world: WorldSource, index: int) -> str:
    """Return the format of a sound file: "jpeg", "png" or "webp"."""
    if not world.defects:
        return "jpeg"
    return pick_share(dice("format", world.seed, index), FORMATS) or "jpeg"


def _drawn(world: WorldSource, index: int) -> str | None:
    return pick_share(dice("defect", world.seed, index), DEFECTS) if world.defects else None


def _original(world: WorldSource, index: int) -> int | None:
    """Return the nearest sound index at or before a random distance back; None if there is none."""
    first = index - 1 - int(dice("original", world.seed, index).random() * _REACH)
    return next((i for i in range(first, -1, -1) if _drawn(world, i) is None), None)
