"""(world, index) → what is wrong with the file at that address, and which scene it really shows.

Everything follows from the world's seed and the index, never from how many scenes the world has: a larger world only
adds rows.
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
    "near_duplicate": 0.03,  # an earlier index's image, saved again a little brighter or darker
    "rotated": 0.02,  # pixels turned, and the EXIF tag that turns them back: harmless if decoded rightly
}
FORMATS: Final[Mapping[str, float]] = {"png": 0.05, "webp": 0.05}  # under a .jpg address; all others are JPEG
_REACH: Final = 50  # how far back a duplicate's original may lie


def defect(world: WorldSource, index: int) -> str | None:
    """Which of `DEFECTS` the file at `index` has; None for a sound one."""
    drawn = _drawn(world, index)
    if drawn in ("exact_duplicate", "near_duplicate") and _original(world, index) is None:
        return None
    return drawn


def shown_index(world: WorldSource, index: int) -> int:
    """The index of the scene that the image at `index` shows: its own, or the one that it copies."""
    if _drawn(world, index) in ("exact_duplicate", "near_duplicate"):
        original = _original(world, index)
        return index if original is None else original
    return index


def file_format(world: WorldSource, index: int) -> str:
    """The format of a sound file: "jpeg", "png" or "webp"."""
    if not world.defects:
        return "jpeg"
    return pick_share(dice("format", world.seed, index), FORMATS) or "jpeg"


def _drawn(world: WorldSource, index: int) -> str | None:
    return pick_share(dice("defect", world.seed, index), DEFECTS) if world.defects else None


def _original(world: WorldSource, index: int) -> int | None:
    """The nearest sound index at or before a drawn distance back; None if there is none."""
    first = index - 1 - int(dice("original", world.seed, index).random() * _REACH)
    return next((i for i in range(first, -1, -1) if _drawn(world, i) is None), None)
