"""Rows of a dataset → a contact sheet (PNG) of their images, keys and captions

Rows are chosen by ledger values (reason=match, outcome=rejected, or a condition's name; all must hold), or by a file
with one key per line. A row without an image is shown as a frame with the reason in it.
"""

from __future__ import annotations

import difflib
import functools
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from capstan.pipeline import extras
from capstan.pipeline.errors import DiskFull, RecipeError
from capstan.pipeline.html.page import clean, clip
from capstan.pipeline.records import FAILED, OUTCOMES
from capstan.pipeline.report.query import STAGED, Row, Rows, literal, quoted
from capstan.pipeline.report.thumbnails import find_images, find_parts, shrink, why_missing
from capstan.pipeline.storage import Storage

SHOWN: Final = 64  # rows on a sheet, by default
MOST: Final = 1000
_COLUMNS: Final = 8
_SIDE, _GAP, _MARGIN = 192, 16, 24  # pixels: of an image, between cells, around the sheet
_MOST_STILL: Final = 1024  # pixels of a spectrogram, the longer side
_KEY, _TEXT, _TITLE = 9, 12, 16  # pixels: font sizes
_LINES: Final = 2  # lines of a caption
_BOX_LINES: Final = 10  # lines in the frame of a row without an image
_BOX_LETTERS: Final = 26
_INK, _SOFT, _LINE, _PAPER, _PANEL = "#1b1f24", "#59626e", "#aeb5bf", "#ffffff", "#f4f5f7"
_LISTED: Final = 12  # values listed if nothing was found
_FONTS: Final = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "Arial Unicode.ttf")


@dataclass(frozen=True)
class Chosen:
    """Rows to show, in order; `found` is the number that match; `title` describes them."""

    keys: list[str]
    found: int
    title: str


def write_sheet(storage: Storage, samples: Sequence[str], out: Path, count: int = SHOWN) -> dict[str, Any]:
    """Write the contact sheet `out` (PNG) of the first `count` rows that match all of `samples`; return a summary.

    Raises RecipeError for names that the ledger does not know, if no row matches, and if `out` cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise RecipeError("-o", f"{out} is not a PNG file", "name one that ends in .png")
    with Rows(storage) as rows:
        chosen = _choose(rows, samples, count)
        shown = rows.rows(chosen.keys)
        images = find_images(rows, shown.values())
        images |= _clips(rows, list(shown.values()), images)
        cells = [_cell(shown[key], images.get(key)) for key in chosen.keys]
    title = f"{storage.url} · {chosen.title} · {len(cells):,} of {chosen.found:,} rows"
    data = io.BytesIO()
    _sheet(cells, title).save(data, "PNG", optimize=True)
    try:
        Storage(str(out.parent)).write(out.name, data.getvalue())  # creates its temporary file exclusively
    except (OSError, DiskFull) as error:
        raise RecipeError("-o", f"cannot write {out} ({error})", "name a PNG file that can be written") from None
    return {
        "sheet": str(out),
        "shown": len(cells),
        "found": chosen.found,
        "without_picture": len(cells) - len(images),
    }


def _clips(rows: Rows, shown: list[Row], images: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return key → JPEG of a clip's frames and waveform, for rows that are clips; `images` are their own images."""
    if "frames" not in rows.columns or not shown or extras.missing(extras.VIDEO) is not None:
        return {}
    from capstan.pipeline.media.strip import picture_of

    keys = ", ".join(literal(row.key) for row in shown)
    frames = dict(rows.query(f"SELECT key, frames FROM rows WHERE key IN ({keys})"))
    found = {}
    for key, parts in find_parts(rows, shown).items():
        still = shrink(images[key], _MOST_STILL) if key in images and "mp4" not in parts else None
        spectrogram = None if still is None else np.asarray(still)
        picture = picture_of(parts.get("mp4"), parts.get("flac"), frames[key], _SIDE, spectrogram)
        if picture is not None:
            data = io.BytesIO()
            Image.fromarray(picture).save(data, "JPEG", quality=92, subsampling=0)
            found[key] = data.getvalue()
    return found


# Which rows -----------------------------------------------------------------------------------------------------------


def _choose(rows: Rows, samples: Sequence[str], count: int) -> Chosen:
    conditions: list[str] = []
    parameters: list[Any] = []
    listed: list[str] = []
    for sample in samples:
        column, equals, wanted = sample.partition("=")
        if not equals and Path(sample).is_file():
            listed += _key_list(Path(sample))
            continue
        if not equals:
            column, wanted = _column_of(rows, sample), sample
        sql, parameter = _equals(rows, column, wanted)
        conditions.append(sql)
        parameters.append(parameter)
    where = " AND ".join(conditions) or "true"
    if listed:
        where += f" AND key IN ({', '.join(map(literal, listed))})"
    ((found,),) = rows.query(f"SELECT count(*) FROM rows WHERE {where}", parameters)
    if not found:
        hint = _available(rows, samples, listed)
        raise RecipeError("--samples", f"no row matches {' and '.join(samples)}", hint)
    keys = rows.keys(where, found if listed else count, parameters)
    if listed:
        place = {key: number for number, key in reversed(list(enumerate(listed)))}
        keys = sorted(keys, key=place.__getitem__)[:count]
    return Chosen(keys, found, " and ".join(samples))


def _key_list(path: Path) -> list[str]:
    """Read the keys in a file, one per line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            "--samples", f"cannot read {path} ({error})", "name a text file with one key per line"
        ) from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise RecipeError("--samples", f"{path} names no key", "write one key per line")
    return keys


def _column_of(rows: Rows, word: str) -> str:
    """Return the column that holds a bare word: `outcome`, or `reason`, which includes the conditions' names."""
    if word in (*OUTCOMES, STAGED):
        return "outcome"
    reasons = {reason for _, reason in rows.outcomes if reason} | rows.conditions.keys()
    if word in reasons:
        return "reason"
    near = difflib.get_close_matches(word, [*OUTCOMES, *reasons], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else _available(rows, [], [])
    raise RecipeError("--samples", f"{word!r} is not a file, outcome, reason or condition", hint)


def _equals(rows: Rows, column: str, wanted: str) -> tuple[str, Any]:
    """Return SQL that is true if `column` equals `wanted`, and its parameter."""
    if column not in rows.columns:
        near = difflib.get_close_matches(column, list(rows.columns), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"columns: {', '.join(rows.columns)}"
        raise RecipeError("--samples", f"no column {column!r}", hint)
    if rows.columns[column] == "VARCHAR":
        return f"{quoted(column)} = ?", wanted
    try:
        return f"{quoted(column)}::DOUBLE = ?", float(wanted)
    except ValueError:
        problem = f"{column} holds numbers, {wanted!r} is not a number"
        raise RecipeError("--samples", problem, "write a number") from None


def _available(rows: Rows, samples: Sequence[str], listed: Sequence[str]) -> str:
    """Return the hint if nothing was found: the values of the named columns, the most frequent first."""
    if listed:
        example = rows.keys("true", 1)
        return f"keys look like {example[0]}" if example else "the dataset has no rows"
    columns = [sample.partition("=")[0] for sample in samples if "=" in sample] or ["outcome", "reason"]
    parts = []
    for column in dict.fromkeys(columns):
        text = f"left({quoted(column)}::VARCHAR, 60)"
        query = f"SELECT {text}, count(*) FROM rows GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {_LISTED + 1}"
        values = [f"{value} ({count:,})" for value, count in rows.query(query) if value]
        more = ", …" if len(values) > _LISTED else ""
        parts.append(
            f"{column} is one of {', '.join(values[:_LISTED])}{more}" if values else f"{column} is always empty"
        )
    return "; ".join(parts)


# The sheet ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """An image, or why it is missing, and the texts below it."""

    image: Image.Image | None
    missing: str
    key: str
    caption: str


def _cell(row: Row, jpeg: bytes | None) -> _Cell:
    image = shrink(jpeg, _SIDE) if jpeg else None
    missing = "cannot be decoded" if jpeg and image is None else why_missing(row)
    if row.outcome == FAILED:  # what was asked for, and what came back
        missing = "\n".join([missing, clip(_without_query(row.url), 120), clip(row.detail, 120)])
    return _Cell(image, missing, clean(row.key), clean(clip(row.caption, 200)))


def _without_query(url: str) -> str:
    """Return a URL without user, password, query and fragment, which may hold signatures and secrets.

    >>> _without_query("https://me:pw@host.example/a/b.jpg?X-Amz-Signature=1#x")
    'https://host.example/a/b.jpg'
    """
    scheme, separator, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def _sheet(cells: Sequence[_Cell], title: str) -> Image.Image:
    """Draw the cells in rows, each image in a square with its texts below."""
    columns = min(_COLUMNS, max(len(cells), 3))  # leaves room for the title above a single image
    height = _SIDE + 6 + _KEY + 6 + _LINES * (_TEXT + 4)
    lines = -(-len(cells) // columns)
    head = _TITLE + 20
    size = (
        2 * _MARGIN + columns * (_SIDE + _GAP) - _GAP,
        2 * _MARGIN + head + lines * (height + _GAP) - _GAP,
    )
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = _font(_TITLE)
    pen.text((_MARGIN, _MARGIN), _fitting(clean(title), font, size[0] - 2 * _MARGIN), fill=_INK, font=font)
    for number, cell in enumerate(cells):
        x = _MARGIN + number % columns * (_SIDE + _GAP)
        y = _MARGIN + head + number // columns * (height + _GAP)
        _draw(sheet, pen, cell, x, y)
    return sheet


def _draw(sheet: Image.Image, pen: ImageDraw.ImageDraw, cell: _Cell, x: int, y: int) -> None:
    box = (x, y, x + _SIDE - 1, y + _SIDE - 1)
    if cell.image is None:
        pen.rectangle(box, outline=_LINE)
        parts = clean(cell.missing).split("\n")
        message = "\n".join([line for part in parts for line in textwrap.wrap(part, _BOX_LETTERS)][:_BOX_LINES])
        pen.text((x + _SIDE / 2, y + _SIDE / 2), message, fill=_SOFT, font=_font(_TEXT), anchor="mm", align="center")
    else:
        pen.rectangle(box, fill=_PANEL)
        image = _enlarged(cell.image)
        sheet.paste(image, (x + (_SIDE - image.width) // 2, y + (_SIDE - image.height) // 2))
    font = _font(_KEY)
    pen.text((x, y + _SIDE + 5), _fitting(cell.key, font, _SIDE), fill=_SOFT, font=font)
    top = y + _SIDE + 5 + _KEY + 5
    for line in _wrapped(cell.caption or "no caption", _font(_TEXT), _SIDE):
        pen.text((x, top), line, fill=_INK if cell.caption else _SOFT, font=_font(_TEXT))
        top += _TEXT + 4


def _enlarged(image: Image.Image) -> Image.Image:
    """Enlarge a tiny image by a whole factor; return others as they are."""
    times = _SIDE // max(image.size)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST) if times > 1 else image


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Wrap a text into its first lines, breaking a word only if it does not fit."""
    lines: list[str] = []
    while text and len(lines) < _LINES:
        end = len(_fitting(text, font, width, mark=""))
        if end < len(text) and len(lines) == _LINES - 1:
            return [*lines, _fitting(text, font, width)]
        if end < len(text) and " " in text[1 : end + 1]:
            end = text.rindex(" ", 1, end + 1)
        end = max(end, 1)
        lines.append(text[:end])
        text = text[end:].lstrip()
    return lines


def _fitting(text: str, font: Any, width: int, mark: str = "…") -> str:
    """Cut a text to `width` pixels; `mark` shows that it was cut."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle] + mark) <= width else (low, middle - 1)
    return text[:low] + mark


@functools.cache
def _font(size: int) -> Any:
    """Return a font with many scripts if the machine has one, else Pillow's own."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
