"""Count what a file makes its decoder allocate, before anything is decoded.

`image.max_pixels` limits the pixels that are shown (decode) and, here, pixels that are allocated besides them. JPEG and
PNG files are checked in their own modules.
"""

from __future__ import annotations

from typing import Any, Final

from PIL import TiffImagePlugin

from capstan.pipeline.image import sniff
from capstan.pipeline.image.sniff import Unreadable

_ANIMATION_CANVASES: Final = 3  # of 4 bytes per pixel: composing frames takes two besides the one that is shown


def check_header(kind: str, data: bytes, most: int) -> None:
    """Raise Unreadable(`too_many_pixels`) for a file whose decoder allocates more than `most` pixels on opening it."""
    if kind == "webp":
        width, height = sniff.webp_size(data)
        canvases = _ANIMATION_CANVASES if sniff.webp_is_animated(data) else 1
        _check(canvases * width * height, most, f"{canvases} canvas of {width} x {height}")
    elif kind == "avif":
        for width, height in sniff.avif_sizes(data):
            _check(width * height, most, f"an image of {width} x {height}")


def check_tiff(frame: TiffImagePlugin.TiffImageFile, data: bytes, most: int) -> None:
    """Check that the strips or tiles are within the file, that a tile is no larger than `most` pixels of 4 bytes, and
    that the first page is the image.
    """
    tags: Any = frame.tag_v2
    if int(tags.get(254, 0)) & 1:
        raise Unreadable("unsupported", "the first page is a thumbnail, as in camera raw files")
    width, height, bits = int(tags.get(322, 0)), int(tags.get(323, 0)), sum(tags.get(258, (1,)))
    _check(width * height * max(bits, 32) // 32, most, f"tiles of {width} x {height}, {bits} bits per pixel")
    for offsets, counts in ((273, 279), (324, 325)):
        ends = [at + size for at, size in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False)]
        if ends and max(ends) > len(data):
            raise Unreadable("truncated", f"{len(data)} of {max(ends)} bytes")


def _check(pixels: int, most: int, what: str) -> None:
    if pixels > most:
        raise Unreadable("too_many_pixels", what)
