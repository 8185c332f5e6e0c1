"""The same prompts drawn by each arm, side by side, as one PNG: a row a prompt, a column an arm."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

_CELL, _MOST = 112, 160  # pixels of an image, at least and at most
_TEXT: Final = 300  # pixels of the column of prompts
_LINES: Final = 9  # of a prompt, at most
_FONT: Final = 14  # pixels
_MARGIN: Final = 10  # pixels


def side_by_side(rows: Sequence[tuple[str, Mapping[str, np.ndarray | None]]]) -> bytes:
    """(prompt, column → image uint8 [side, side, 3] or None), the same columns in each row → PNG."""
    from PIL import Image, ImageDraw, ImageFont

    columns = list(rows[0][1])
    side = next(image.shape[0] for _, images in rows for image in images.values() if image is not None)
    cell = side * -(-_CELL // side) if side < _CELL else min(side, _MOST)
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
                drawn = Image.fromarray(np.ascontiguousarray(image)).resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(drawn, (_MARGIN + _TEXT + number * (cell + _MARGIN), top))
        top += height
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()
