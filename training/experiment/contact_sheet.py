"""Images of several arms → one PNG: one row per prompt, one column per arm."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

_SMALLEST, _LARGEST = 112, 160  # pixels per side of an image
_TEXT: Final = 300  # pixels, width of the prompt column
_LINES: Final = 9  # per prompt, at most
_FONT: Final = 14  # pixels
_MARGIN: Final = 10  # pixels


def side_by_side(rows: Sequence[tuple[str, Mapping[str, np.ndarray | None]]]) -> bytes:
    """Return a PNG of rows (prompt, column → image uint8 [side, side, 3] or None); all rows have the same columns."""
    from PIL import Image, ImageDraw, ImageFont

    columns = list(rows[0][1])
    side = next(image.shape[0] for _, images in rows for image in images.values() if image is not None)
    cell = side * -(-_SMALLEST // side) if side < _SMALLEST else min(side, _LARGEST)
    font = ImageFont.load_default(size=_FONT)
    letters = int((_TEXT - _MARGIN) / font.getlength("n"))
    line = _FONT + 4
    wrapped = [textwrap.wrap(prompt, letters, max_lines=_LINES, placeholder=" …") or [""] for prompt, _ in rows]
    heights = [max(cell, line * len(lines)) + _MARGIN for lines in wrapped]
    width = _MARGIN + _TEXT + len(columns) * (cell + _MARGIN)
    sheet = Image.new("RGB", (width, 2 * _MARGIN + line + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(columns):
        pen.text((_MARGIN + _TEXT + number * (cell + _MARGIN), _MARGIN), name, fill="black", font=font)
    top = 2 * _MARGIN + line
    for (_, images), lines, height in zip(rows, wrapped, heights, strict=True):
        pen.text((_MARGIN, top), "\n".join(lines), fill="black", font=font, spacing=4)
        for number, image in enumerate(images.values()):
            if image is not None:
                scaled = Image.fromarray(np.ascontiguousarray(image)).resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(scaled, (_MARGIN + _TEXT + number * (cell + _MARGIN), top))
        top += height
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()
