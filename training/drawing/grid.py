"""What was drawn → one labelled image (PNG)"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from capstan.pipeline.errors import CapstanError
from capstan.training.drawing.drawer import Drawn

_CELL: Final = 224  # smallest side of an image in the grid, pixels
_FONT: Final = 14  # pixels
_MARGIN: Final = 12  # pixels


def sheet(drawn: Drawn, labels: Sequence[str], *, columns: int | None = None) -> Any:
    """Return a PIL image of everything drawn, labelled. A clip is the row of its frames."""
    if drawn.kind == "image":
        return grid(drawn.arrays, labels, columns=columns)
    if drawn.kind == "clip":
        frames = drawn.arrays.shape[1]
        names = [label if frame == 0 else "" for label in labels for frame in range(frames)]
        return grid(drawn.arrays.reshape(-1, *drawn.arrays.shape[2:]), names, columns=frames, cell=_CELL // 2)
    raise CapstanError(f"a {drawn.kind} cannot be shown in an image")


def grid(images: np.ndarray, labels: Sequence[str], *, columns: int | None = None, cell: int = _CELL) -> Any:
    """Return a PIL image: every image enlarged to `cell` pixels or more, with its label wrapped below it."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = images.shape[1:3]
    scale = max(1, -(-cell // max(height, width)))
    across = columns or min(len(images), 4 if len(images) % 4 == 0 or len(images) > 6 else 3)
    down = -(-len(images) // across)
    font = ImageFont.load_default(size=_FONT)
    letters = int(width * scale / font.getlength("n"))
    wrapped = [textwrap.wrap(label, letters) or [""] for label in labels]
    line = _FONT + 4
    box = (width * scale + _MARGIN, height * scale + line * max(map(len, wrapped)) + 2 * _MARGIN)
    sheet = Image.new("RGB", (across * box[0] + _MARGIN, down * box[1] + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = _MARGIN + index % across * box[0], _MARGIN + index // across * box[1]
        enlarged = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.LANCZOS)
        sheet.paste(enlarged, (x, y))
        pen.text((x, y + height * scale + 4), "\n".join(lines), fill="black", font=font, spacing=4)
    return sheet
