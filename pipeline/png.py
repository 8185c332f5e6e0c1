"""The chunks of a PNG file, and whether its pixels are all there; the chunk and field names are the specification's.

What is read here has passed `formats.check_whole`: every chunk lies within the file, up to IEND.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from pipeline.formats import PNG_MAGIC, Unreadable

_SAMPLES: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type → samples a pixel (11.2.1)
# The passes of Adam7 (8.2): first column and row, steps to the next ones.
_PASSES: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_WHOLE: Final = ((0, 0, 1, 1),)
_AT_ONCE: Final = 16_384  # bytes that are unpacked together: at most a thousand times as many come out (RFC 1951)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each chunk, its length and checksum included."""
    at = len(PNG_MAGIC)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, end
        at = end


def last_row(data: bytes) -> int:
    """The row that is complete only if all pixels are there: the last one that the file states."""
    height = int.from_bytes(data[20:24], "big")
    return height // 2 * 2 - 1 if data[28] else height - 1  # Adam7 ends with the odd rows


def check_pixels(data: bytes) -> None:
    """Raise Unreadable(`truncated`) where the data end before the last row does, though all checksums hold: decoders
    leave black what is missing, and say nothing. To unpack again adds 40% to decoding."""
    missing = _stated_bytes(data)
    unpacker, view = zlib.decompressobj(), memoryview(data)
    for name, start, end in _chunks(data):
        for at in range(start + 8, end - 4, _AT_ONCE) if name == b"IDAT" else ():
            missing -= len(unpacker.decompress(view[at : min(at + _AT_ONCE, end - 4)]))
            if missing <= 0:
                return
            if unpacker.eof:
                break
    raise Unreadable("truncated", f"the last {missing} bytes of pixels are missing")


def _stated_bytes(data: bytes) -> int:
    """Of the unpacked pixels, by IHDR; each row of each pass begins with the byte that names its filter."""
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    bits = data[24] * _SAMPLES.get(data[25], 1)
    total = 0
    for left, top, right, down in _PASSES if data[28] else _WHOLE:
        columns, rows = len(range(left, width, right)), len(range(top, height, down))
        total += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return total
