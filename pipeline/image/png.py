"""The chunks of a PNG file: those that pixels need, and whether the pixels are all there.

Chunks and fields are named as in the PNG specification (W3C, third edition), whose sections are cited.

What is read here has passed `formats.check_whole`: every chunk lies within the file, up to IEND.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from capstan.pipeline.image.sniff import PNG_MAGIC, Unreadable

_SAMPLES: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type → samples a pixel (11.2.1)
# The passes of Adam7 (8.2): first column and row, steps to the next ones.
_PASSES: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_WHOLE: Final = ((0, 0, 1, 1),)
_NEEDED: Final = frozenset({b"tRNS", b"eXIf"})  # of the ancillary chunks; eXIf says what is up
_LARGEST_PROFILE: Final = 4 * 1024**2  # bytes; those of monitors, cameras and printers take up to some 2 MB
_AT_ONCE: Final = 16_384  # bytes that are unpacked together: at most a thousand times as many come out (RFC 1951)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each chunk, its length and checksum included, up to the last; what follows is ignored."""
    at = len(PNG_MAGIC)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        yield name, at, end
        if name == b"IEND":
            return
        at = end


def bare(data: bytes) -> tuple[bytes, bytes]:
    """The file with nothing but the chunks that pixels need, and its ICC profile, b"" without a usable one.

    For what is wrong with any other chunk Pillow refuses the image, and compressed text can be a bomb. Viewers pass
    over such chunks, and over ancillary ones with a wrong checksum.
    """
    kept, profile = [PNG_MAGIC], b""
    for name, start, end in _chunks(data):
        critical = not name[0] & 0x20
        if critical or (name in _NEEDED and _is_sound(data, start, end)):
            kept.append(data[start:end])
        elif name == b"iCCP" and not profile and _is_sound(data, start, end):
            profile = _unpacked(data[start + 8 : end - 4])
    return b"".join(kept), profile


def _is_sound(data: bytes, start: int, end: int) -> bool:
    return zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")


def _unpacked(body: bytes) -> bytes:
    """The profile in an iCCP chunk: its name, a zero, the method (0: zlib), what is packed (11.3.2.3)."""
    rest = body.partition(b"\0")[2]
    try:
        profile = zlib.decompressobj().decompress(rest[1:], _LARGEST_PROFILE + 1) if rest[:1] == b"\0" else b""
    except zlib.error:
        return b""
    return profile if len(profile) <= _LARGEST_PROFILE else b""


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
