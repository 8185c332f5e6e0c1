"""The walk over a PNG's chunks, and the decoder behind it."""

from __future__ import annotations

import zlib

from drawn import file_of, png_of, ramp, with_chunk

from capstan.pipeline.image import png, sniff
from fuzz_targets.images import check_image, typed, without_ends

SUFFIXES = (".png",)
WORDS = [
    b"IHDR",
    b"PLTE",
    b"IDAT",
    b"IEND\xaeB`\x82",
    b"tRNS",
    b"iCCP",
    b"eXIf",
    b"acTL",
    b"zTXt",
    b"\x89PNG\r\n\x1a\n",
]
LONGEST = 1 << 14


def seeds() -> list[bytes]:
    small = ramp(24, 16)
    plain = [file_of(small.convert(mode), "png") for mode in ("RGB", "RGBA", "L", "1", "P", "I;16", "LA")]
    rows = b"".join(bytes([0]) + bytes(range(8)) for _ in range(8))
    passes = png_of((8, 8), 8, 0, rows + bytes(40), interlaced=True)
    profile = with_chunk(plain[0], b"iCCP", b"name\0\0" + zlib.compress(b"profile" * 9))
    exif = with_chunk(plain[0], b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0")
    return without_ends([*plain, passes, profile, exif])


def check(data: bytes) -> None:
    check_image(_with_sums(data), "png", _walk)
    check_image(data, "png", _walk)


def _walk(data: bytes) -> None:
    whole = png.closed(data)
    assert png.closed(whole) == whole
    bare, profile = png.bare(whole)
    assert len(bare) <= len(whole)
    assert len(profile) <= 4 << 20
    sniff.check_whole("png", bare)
    png.last_row(whole)
    for check_ in (png.check_size, png.check_pixels):
        with typed():
            check_(whole)


def _with_sums(data: bytes) -> bytes:
    """Return the file with right checksums: a random change would end at the first of them."""
    file, at = bytearray(data), 8
    while at + 12 <= len(file):
        end = at + 12 + int.from_bytes(file[at : at + 4], "big")
        if end > len(file):
            break
        file[end - 4 : end] = zlib.crc32(file[at + 4 : end - 4]).to_bytes(4, "big")
        at = end
    return bytes(file)
