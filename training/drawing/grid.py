"""What was drawn → one labelled image (PNG)"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from capstan.training.drawing.drawer import Drawn
from capstan.training.drawing.films import pictures
from capstan.training.drawing.sounds import spectrograms

_CELL: Final = 224  # smallest side of an image in the grid, pixels
_FONT: Final = 14  # pixels
_MARGIN: Final = 12  # pixels


def sheet(drawn: Drawn, labels: Sequence[str], *, columns: int | None = None) -> Any:
    """Return a PIL image of everything drawn, labelled.

    A clip is the row of its frames, a sound its spectrogram, a film both.
    """
    if drawn.kind in ("image", "scene"):
        return grid(drawn.images, labels, columns=columns)
    if drawn.kind == "clip":
        frames = drawn.arrays.shape[1]
        names = [label if frame == 0 else "" for label in labels for frame in range(frames)]
        return grid(drawn.arrays.reshape(-1, *drawn.arrays.shape[2:]), names, columns=frames, cell=_CELL // 2)
    if drawn.kind == "film":
        return grid(pictures(drawn), labels, columns=columns or 1, cell=1)
    assert drawn.kind == "sound"
    return grid(spectrograms(drawn), labels, columns=columns)


class _Layout:
    """Where `grid` puts images and labels; pixels."""

    def __init__(self, labels: Sequence[str], height: int, width: int, columns: int | None, cell: int) -> None:
        from PIL import ImageFont

        count = len(labels)
        scale = max(1, -(-cell // max(height, width)))
        self.width, self.height = width * scale, height * scale
        self.across = columns or min(count, 4 if count % 4 == 0 or count > 6 else 3)
        self.font = ImageFont.load_default(size=_FONT)
        letters = int(self.width / self.font.getlength("n"))
        self.wrapped = [textwrap.wrap(label, letters) or [""] for label in labels]
        below = (_FONT + 4) * max(map(len, self.wrapped)) + 2 * _MARGIN
        self.box = (self.width + _MARGIN, self.height + below)
        down = -(-count // self.across)
        self.size = (self.across * self.box[0] + _MARGIN, down * self.box[1] + _MARGIN)

    def place(self, index: int) -> tuple[int, int]:
        """Return the upper left corner of an image."""
        return _MARGIN + index % self.across * self.box[0], _MARGIN + index // self.across * self.box[1]


def grid(images: np.ndarray, labels: Sequence[str], *, columns: int | None = None, cell: int = _CELL) -> Any:
    """Return a PIL image: every image enlarged to `cell` pixels or more, with its label wrapped below it."""
    from PIL import Image, ImageDraw

    height, width = images.shape[1:3]
    layout = _Layout(labels, height, width, columns, cell)
    sheet = Image.new("RGB", layout.size, "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, layout.wrapped, strict=True)):
        x, y = layout.place(index)
        sheet.paste(Image.fromarray(image).resize((layout.width, layout.height), Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + layout.height + 4), "\n".join(lines), fill="black", font=layout.font, spacing=4)
    return sheet


def cut(sheet: Any, labels: Sequence[str], side: int, *, columns: int | None = None, cell: int = _CELL) -> list[Any]:
    """Return the images of a `grid` of squares, enlarged as they are there; [] if it is not one of these labels."""
    layout = _Layout(labels, side, side, columns, cell)
    if sheet.size != layout.size:
        return []
    corners = map(layout.place, range(len(labels)))
    return [sheet.crop((x, y, x + layout.width, y + layout.height)) for x, y in corners]
