"""PNG chunks: keep those that pixels need; check that no pixel is missing.

Chunks and fields are named as in the PNG specification (W3C, third edition), whose sections are cited.

Files read here have passed `sniff.check_whole`: every chunk up to IEND is within the file. What may be wrong with IEND
itself, `closed` sets right first.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from capstan.pipeline.image.sniff import PNG_END, PNG_MAGIC, Unreadable

_SAMPLES: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type → samples per pixel (11.2.1)
# The passes of Adam7 (8.2): first column and row, steps to the next ones.
_PASSES: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_WHOLE: Final = ((0, 0, 1, 1),)
_CRITICAL: Final = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_NEEDED: Final = frozenset({b"tRNS", b"eXIf"})  # ancillary chunks that change the image; eXIf holds the orientation
_LARGEST_PROFILE: Final = 4 * 1024**2  # bytes; profiles of monitors, cameras and printers take up to about 2 MB
_MOST_UNPACKED: Final = 1_032  # times
_AT_ONCE: Final = 16_384  # bytes unpacked together: they expand at most about a thousandfold (RFC 1951)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each chunk up to IEND, length and checksum included; later bytes are ignored."""
    at = len(PNG_MAGIC)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        yield name, at, end
        if name == b"IEND":
            return
        at = end


def closed(data: bytes) -> bytes:
    """Return the file with a sound IEND at its end, unchanged if it has one (bytes after it are ignored)."""
    end = len(data)
    for name, start, after in _chunks(data):
        if name == b"IEND" and data[start:after] == PNG_END:
            return data
        if name == b"IEND" or after > len(data):
            end = start
    return data[:end] + PNG_END


def bare(data: bytes) -> tuple[bytes, bytes]:
    """Return the file reduced to the chunks that pixels need, and its ICC profile (b"" without a usable one).

    Pillow rejects an image for a fault in any other chunk, and compressed text can be a bomb. Viewers skip such chunks,
    and ancillary ones with a wrong checksum.
    """
    kept, profile, seen = [PNG_MAGIC], b"", set[bytes]()
    for name, start, end in _chunks(data):
        if name in _CRITICAL:
            kept.append(data[start:end])
        elif name not in seen and (name in _NEEDED or name == b"iCCP") and _is_sound(data, start, end):
            seen.add(name)  # a second one is not legal, and thousands would take time or memory
            if name == b"iCCP":
                profile = _unpacked(data[start + 8 : end - 4])
            else:
                kept.append(data[start:end])
    return b"".join(kept), profile


def check_size(data: bytes) -> None:
    """Raise Unreadable(`truncated`) if the file is too small for its pixels, before memory for them is allocated.

    Deflate packs at most 1,032 bytes into one (RFC 1951: 258 bytes by two bits).
    """
    least = _stated_bytes(data) // _MOST_UNPACKED
    if len(data) < least:
        raise Unreadable("truncated", f"{len(data)} bytes cannot hold the pixels, which take {least} or more")


def _is_sound(data: bytes, start: int, end: int) -> bool:
    return zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")


def _unpacked(body: bytes) -> bytes:
    """Return the profile of an iCCP chunk: name, zero, method (0: zlib), compressed profile (11.3.2.3)."""
    rest = body.partition(b"\0")[2]
    try:
        profile = zlib.decompressobj().decompress(rest[1:], _LARGEST_PROFILE + 1) if rest[:1] == b"\0" else b""
    except zlib.error:
        return b""
    return profile if len(profile) <= _LARGEST_PROFILE else b""


def last_row(data: bytes) -> int:
    """Return the row that decoders fill last: it is complete only if no pixel is missing."""
    height = int.from_bytes(data[20:24], "big")
    return height // 2 * 2 - 1 if data[28] else height - 1  # Adam7 ends with the odd rows


def check_pixels(data: bytes) -> None:
    """Raise Unreadable(`truncated`, or `corrupt`) if the data end before the last row, although all checksums hold.

    Decoders leave missing pixels black without a warning. Unpacking again adds 40% to decoding.
    """
    missing = _stated_bytes(data)
    unpacker, view = zlib.decompressobj(), memoryview(data)
    for name, start, end in _chunks(data):
        for at in range(start + 8, end - 4, _AT_ONCE) if name == b"IDAT" else ():
            try:
                missing -= len(unpacker.decompress(view[at : min(at + _AT_ONCE, end - 4)]))
            except zlib.error as error:
                raise Unreadable("corrupt", f"packed pixels: {error}") from None
            if missing <= 0:
                return
            if unpacker.eof:
                break
    raise Unreadable("truncated", f"the last {missing} bytes of pixels are missing")


def _stated_bytes(data: bytes) -> int:
    """Return the size in bytes of the unpacked pixels by IHDR; each row of each pass starts with its filter byte."""
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    bits = data[24] * _SAMPLES.get(data[25], 1)
    total = 0
    for left, top, right, down in _PASSES if data[28] else _WHOLE:
        columns, rows = len(range(left, width, right)), len(range(top, height, down))
        total += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return total
