"""captions/diff-*.json (from `capstan captions diff`) → a comparison table"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Final

from pydantic import BaseModel, Field, ValidationError

from capstan.pipeline.html import page
from capstan.pipeline.html.page import Cell, Html
from capstan.pipeline.storage import Storage

_MOST: Final = 40  # comparisons shown
_NAME: Final = 60  # characters of a layer's name, and of the judge's
_BYTES: Final = 1_000_000  # of a file that may be a comparison


class _Rate(BaseModel):
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.1%} ({self.low:.1%} to {self.high:.1%})"


class _Words(BaseModel):
    mean: float


class _Side(BaseModel):
    name: str
    clip_mean: float
    clip_min: float
    recall: float
    words: _Words


class _Comparison(BaseModel):
    """The fields that are shown; the files hold more, and their own page shows all."""

    images: int = Field(validation_alias="pictures")  # the file's key
    clip: str
    a: _Side
    b: _Side
    a_wins_by_mean: _Rate
    a_wins_by_min: _Rate


def comparisons(storage: Storage) -> list[Html]:
    """Return a table of all comparisons' main numbers with links to their pages; [] if there is no comparison."""
    files = {name for name in storage.names("captions") if PurePosixPath(name).match("captions/diff-*")}
    found = sorted(name for name in files if name.endswith(".json"))
    if not found:
        return []
    rows = [row for name in found[:_MOST] for row in _rows(storage, name, files)]
    header = ["", "captions", "CLIP score", "worst sentence", "own image found", "words", "wins", "by worst sentence"]
    blocks = [
        page.note(
            "Score: 100 × the cosine of image and sentence in the named CLIP model. Own image found: the share of "
            "captions closer to their image than to its nearest neighbours. Wins: of the first layer, with 95% "
            "confidence intervals."
        ),
        page.table(header, rows),
    ]
    return [*blocks, page.note(f"And {len(found) - _MOST:,} more.")] if len(found) > _MOST else blocks


def _rows(storage: Storage, name: str, files: set[str]) -> list[list[Any]]:
    """Return one row per side; for a file that is not a comparison, one row that says so."""
    stem = PurePosixPath(name).stem
    try:
        found = _Comparison.model_validate_json(storage.read(name) if storage.size(name) <= _BYTES else b"")
    except ValidationError:
        return [[page.clip(stem, 2 * _NAME), "cannot be read: run captions diff again", *[""] * 6]]
    about = f"{found.images:,} images, {page.clip(found.clip, _NAME)}"
    whole = name.removesuffix(".json") + ".html"
    first = Cell(page.link(about, whole)) if whole in files else about
    return [
        [first, *_numbers(found.a), str(found.a_wins_by_mean), str(found.a_wins_by_min)],
        ["", *_numbers(found.b), "", ""],
    ]


def _numbers(side: _Side) -> list[Any]:
    return [page.clip(side.name, _NAME), side.clip_mean, side.clip_min, side.recall, side.words.mean]
