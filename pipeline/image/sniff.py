"""Detect a file's image format, and whether the file ends early.

Nothing is decoded here. Decoders treat truncated files differently: some fill with grey, some stop, some do not
notice. If a format states its own length or checksums, these are checked here first, so that a cut file is `truncated`
and a damaged one `corrupt`, whatever the decoder.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import Final


class Unreadable(Exception):
    """The bytes are not a usable image: one of the failure reasons in `records`, and a detail for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
PNG_END: Final = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk
_READ: Final = {
    b"\xff\xd8\xff": "jpeg",
    PNG_MAGIC: "png",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II+\0": "tiff",  # BigTIFF
    b"MM\0+": "tiff",
}
# Image formats that Capstan does not read.
_NOT_READ: Final = {
    b"8BPS": "PSD",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\1\0": "ICO",
    b"\0\0\2\0": "CUR",
    b"%!PS": "PostScript",
    b"qoif": "QOI",
    b"DDS ": "DDS",
    b"#?RADIANCE": "Radiance HDR",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"\x8aMNG\r\n\x1a\n": "MNG",
    b"IIRO": "ORF camera raw",
    b"IIU\0": "RW2 camera raw",
    b"FUJIFILMCCD-RAW": "RAF camera raw",
}
_MOST_PARTS: Final = 100_000  # PNG or WebP chunks, boxes; encoders write one per 8 to 64 kB, or per frame
_MOST_SUB_BLOCKS: Final = 1_000_000  # of a GIF; encoders fill all but the last of an image with 255 bytes
_BMP_HEADER_SIZES: Final = (12, 40, 52, 56, 64, 108, 124)


def sniff(data: bytes) -> str:
    """Return the format by its first bytes: jpeg, png, gif, webp, bmp, tiff or avif.

    Raises Unreadable: `empty`, `truncated` (cut within the signature), `unsupported` or `not_an_image`.

    >>> sniff(b"GIF89a...")
    'gif'
    """
    if not data:
        raise Unreadable("empty")
    for magic, kind in _READ.items():
        if data.startswith(magic):
            if kind == "tiff" and data[8:10] == b"CR":
                raise Unreadable("unsupported", "CR2 camera raw")
            return kind
        if len(data) >= 2 and magic.startswith(data):
            raise Unreadable("truncated", f"{len(data)} bytes")
    if len(data) < 18 and data.startswith((b"RIFF", b"BM")):
        raise Unreadable("truncated", f"{len(data)} bytes")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES:
        return "bmp"
    if data[4:8] == b"ftyp":
        return _isobmff_kind(data)
    raise _strange(data)


def _isobmff_kind(data: bytes) -> str:
    """Recognise AVIF by the brands of the `ftyp` box (ISO/IEC 14496-12, 4.3)."""
    box = data[8 : int.from_bytes(data[:4], "big")]
    brands = {box[at : at + 4] for at in range(0, min(len(box), 256), 4) if at != 4}  # box[4:8] is a version
    if brands & {b"avif", b"avis"}:
        return "avif"
    if brands & {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}:
        raise Unreadable("unsupported", "HEIF")
    raise Unreadable("not_an_image", "an MP4 or another ISO media file")


def _strange(data: bytes) -> Unreadable:
    """Return why bytes without a supported signature are rejected."""
    for magic, name in _NOT_READ.items():
        if data.startswith(magic):
            return Unreadable("unsupported", name)
    text = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in text:
        return Unreadable("unsupported", "SVG")
    if text.startswith(b"<"):
        return Unreadable("not_an_image", "HTML or XML")
    return Unreadable("not_an_image", f"starts with {data[:16]!r}")


def check_whole(kind: str, data: bytes) -> None:
    """Raise Unreadable(`truncated` or `corrupt`) if the file's own structure shows that it is incomplete."""
    if kind == "png":
        _check_png(data)
    elif kind == "gif":
        _check_gif(data)
    elif kind == "webp":
        _check_length(_webp_length(data), data)
    elif kind == "avif":
        _check_isobmff(data)


def _check_count(count: int, what: str, most: int = _MOST_PARTS) -> None:
    """Refuse files of so many parts that walking them would take seconds."""
    if count > most:
        raise Unreadable("unsupported", f"more than {most} {what}")


def _check_length(size: int, data: bytes) -> None:
    if size > len(data):
        raise Unreadable("truncated", f"{len(data)} of {size} bytes")


def _check_png(data: bytes) -> None:
    """Walk the chunks up to IEND; the critical ones must match their checksums (PNG specification, 5.3).

    IEND itself holds nothing, so viewers do without it: after IDAT it may be missing, cut or damaged (png.closed).
    """
    at, count, pixels = len(PNG_MAGIC), 0, False
    if len(data) >= at + 8 and data[at + 4 : at + 8] != b"IHDR":
        raise Unreadable("corrupt", f"the PNG starts with chunk {data[at + 4 : at + 8]!r}")
    while True:
        size = int.from_bytes(data[at : at + 4], "big")
        name, end = data[at + 4 : at + 8], at + 12 + size
        if pixels and (name == b"IEND" or PNG_END.startswith(data[at : at + len(PNG_END)])):
            return
        _check_length(max(end, at + 12), data)
        critical = not name[0] & 0x20  # the first letter is a capital
        if critical and zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise Unreadable("corrupt", f"checksum of chunk {name!r}")
        pixels = pixels or name == b"IDAT"
        if name == b"IEND":
            return
        count += 1
        _check_count(count, "PNG chunks")
        at = end


def _check_gif(data: bytes) -> None:
    """Walk the blocks up to the end of the first image (GIF89a, appendix B); later frames are not needed."""
    _check_length(13, data)
    at, count = 13 + _colour_table(data[10]), 0
    while True:
        count += 1
        _check_count(count, "GIF blocks")
        _check_length(at + 1, data)
        block = data[at]
        if block == 0x21:  # an extension
            at = _past_sub_blocks(data, at + 2)
        elif block == 0x2C:  # an image
            _check_length(at + 10, data)
            _past_sub_blocks(data, at + 10 + _colour_table(data[at + 9]) + 1)
            return
        else:
            raise Unreadable("corrupt", "no image in the GIF" if block == 0x3B else f"GIF block 0x{block:02x}")


def _colour_table(flags: int) -> int:
    """Return the size in bytes of the colour table that `flags` announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _past_sub_blocks(data: bytes, at: int) -> int:
    for _ in range(_MOST_SUB_BLOCKS):
        _check_length(at + 1, data)
        if data[at] == 0:
            return at + 1
        at += 1 + data[at]
    raise Unreadable("unsupported", f"more than {_MOST_SUB_BLOCKS} sub-blocks in a GIF")


def _check_isobmff(data: bytes) -> None:
    """Check that the top-level boxes are within the file."""
    at = count = 0
    while at < len(data):
        count += 1
        _check_count(count, "boxes")
        _check_length(at + 8, data)
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 0:  # reaches to the end of the file
            return
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:
            raise Unreadable("corrupt", "box of impossible size")
        at += size
        _check_length(at, data)


def _webp_length(data: bytes) -> int:
    """Return the length of a WebP by its header, without the padding byte after a last chunk of odd size.

    Some writers count that byte (RFC 9649, 2.3) and do not write it; no pixel is in it.
    """
    length = int.from_bytes(data[4:8], "little") + 8
    at, count = 12, 0
    while at + 8 <= min(length, len(data)):
        count += 1
        _check_count(count, "WebP chunks")
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + size + 1 == length and size % 2:
            return length - 1
        at += 8 + size + size % 2
    return length


def padded_webp(data: bytes) -> bytes:
    """Return a whole WebP with its last padding byte, without which libwebp does not read it."""
    return data + b"\0" if _webp_length(data) == len(data) == int.from_bytes(data[4:8], "little") + 7 else data


def webp_is_animated(data: bytes) -> bool:
    """Return whether the header announces an animation (RFC 9649, 2.7.1)."""
    return data[12:16] == b"VP8X" and bool(data[20] & 2)


def avif_sizes(data: bytes) -> list[tuple[int, int]]:
    """Return the sizes in pixels of all images in an AVIF: the shown one, tiles of a grid, alpha, thumbnails.

    They are in the `ispe` boxes (ISO/IEC 23008-12, 6.5.3) of the `meta` box. Only the top-level boxes are walked.
    """
    at = count = 0
    while at + 8 <= len(data):
        count += 1
        _check_count(count, "boxes")
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"meta":
            meta = data[at : at + size]
            _check_count(meta.count(b"ispe"), "images in an AVIF")
            found = (match.end() + 4 for match in re.finditer(b"ispe", meta))
            return [struct.unpack_from(">II", data, at + start) for start in found if at + start + 8 <= len(data)]
        at += size if size >= 8 else len(data)
    return []


def webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height in pixels from the first chunk of a WebP (RFC 9649), before a decoder allocates it."""
    chunk = data[12:16]
    _check_length(30, data)
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    raise Unreadable("corrupt", f"WebP chunk {chunk!r}")
