"""A comparison of captions → a contact sheet and an HTML page"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from capstan.pipeline.html import page
from capstan.recaption.lint import linter

WIDTH: Final = 1100  # pixels
_THUMB, _GAP, _LINE, _SIZE = 180, 16, 19, 15
_INK, _SOFT, _PAPER = (28, 32, 36), (110, 115, 125), (255, 255, 255)
_TEXT_HEIGHT: Final = 4000  # maximum height of the text next to an image, in pixels


@dataclass(frozen=True)
class Entry:
    """An image and its captions by layer name."""

    jpeg: bytes
    texts: Mapping[str, str]


def draw(groups: Mapping[str, Sequence[Entry]]) -> bytes:
    """Draw a PNG: for each layer the images on which it wins by most, with both captions."""
    font, rows = ImageFont.load_default(_SIZE), list[Image.Image]()
    for name, entries in groups.items():
        rows.append(_lines([(f"Where {name} fits best", _INK)], font, WIDTH - 2 * _GAP))
        rows += [_row(entry, font) for entry in entries]
    height = sum(row.height + _GAP for row in rows) + _GAP
    sheet, top = Image.new("RGB", (WIDTH, height), _PAPER), _GAP
    for row in rows:
        sheet.paste(row, (_GAP, top))
        top += row.height + _GAP
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _row(entry: Entry, font: Any) -> Image.Image:
    width = WIDTH - 2 * _GAP
    lines = [part for name, text in entry.texts.items() for part in ((name, _SOFT), (text, _INK))]
    text = _lines(lines, font, width - _THUMB - _GAP)
    made = Image.new("RGB", (width, max(_THUMB, text.height)), _PAPER)
    with Image.open(io.BytesIO(entry.jpeg)) as image:
        small = image.convert("RGB")
        small.thumbnail((_THUMB, _THUMB))
    made.paste(small, (0, 0))
    made.paste(text, (_THUMB + _GAP, 0))
    return made


def _lines(parts: Sequence[tuple[str, tuple[int, int, int]]], font: Any, width: int) -> Image.Image:
    """Draw texts below each other, wrapped to `width` pixels."""
    wrapped = [(line, colour) for text, colour in parts for line in _wrap(text, font, width)][: _TEXT_HEIGHT // _LINE]
    made = Image.new("RGB", (width, _LINE * len(wrapped)), _PAPER)
    pen = ImageDraw.Draw(made)
    for number, (line, colour) in enumerate(wrapped):
        pen.text((0, number * _LINE), line, fill=colour, font=font)
    return made


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def page_of(result: Mapping[str, Any], groups: Mapping[str, Sequence[Entry]]) -> str:
    """Return the comparison as one HTML file."""
    a, b = result["a"], result["b"]
    report = page.Page(
        f"{a['name']} compared with {b['name']}",
        page.paragraph(f"On {result['pictures']:,} images, judged by {result['clip']}.{_unscored(result)}"),
    )
    report.section("How well the captions fit", *_fit(result))
    report.section("How they are written", *_written(a, b))
    report.section("What is wrong with them", _flags(a, b))
    for name, entries in groups.items():
        report.section(f"Where {name} fits best", page.cards([(entry.jpeg, entry.texts) for entry in entries]))
    return report.html()


def _unscored(result: Mapping[str, Any]) -> str:
    count = len(result.get("unscored", {}))
    return f" {count:,} more could not be judged: the CLIP raised an error on them." if count else ""


def _fit(result: Mapping[str, Any]) -> list[page.Html]:
    a, b = result["a"], result["b"]
    rows = [
        ["CLIP score, mean over sentences", a["clip_mean"], b["clip_mean"], _won(result["a_wins_by_mean"])],
        ["CLIP score, worst sentence", a["clip_min"], b["clip_min"], _won(result["a_wins_by_min"])],
        ["own image retrieved", a["recall"], b["recall"], f"chance {result['recall_by_chance']}"],
    ]
    return [
        page.table(["", a["name"], b["name"], f"{a['name']} wins"], rows),
        page.note(
            "Score: 100 × the cosine of image and sentence. Own image retrieved: the share of captions closer to "
            f"their image than to its {result['neighbours']} nearest neighbours by embedding. A CLIP is biased: the "
            "decisive test is how well a model trained on the captions follows prompts."
        ),
    ]


def _won(wins: Mapping[str, float]) -> str:
    return f"{wins['rate']:.1%} ({wins['low']:.1%} to {wins['high']:.1%})"


def _written(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[page.Html]:
    rows = [
        *([f"words, {name}", a["words"][name], b["words"][name]] for name in ("mean", "p10", "p50", "p90")),
        ["entropy of the first three words, bits", *(side["openers"]["entropy_bits"] for side in (a, b))],
        ["all lower case", *(f"{side['style']['lower_case']:.1%}" for side in (a, b))],
        ["full stop at the end", *(f"{side['style']['full_stop']:.1%}" for side in (a, b))],
    ]
    commonest = [
        [side["name"], opener, f"{share:.1%}"]
        for side in (a, b)
        for opener, share in side["openers"]["commonest"].items()
    ]
    return [page.table(["", a["name"], b["name"]], rows), page.table(["", "commonest opener", "share"], commonest)]


def _flags(a: Mapping[str, Any], b: Mapping[str, Any]) -> page.Html:
    reasons = linter.reasons()
    rows = [
        [flag, *(f"{side['flags'].get(flag, 0):.1%}" for side in (a, b)), reasons.get(flag, "")]
        for flag in sorted(a["flags"].keys() | b["flags"].keys())
    ]
    return page.table(["flag", a["name"], b["name"], "why it matters"], rows) if rows else page.paragraph("Nothing.")
