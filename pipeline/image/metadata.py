"""Image files → the metadata in which people reserve rights: XMP packets, and C2PA's manifest store

Metadata is read only, and never reaches a shard. Files read here could be decoded; what is damaged is skipped.

    JPEG    APP1 (XMP), APP11 (JUMBF, ISO/IEC 19566-5, maybe in many segments)
    PNG     iTXt XML:com.adobe.xmp, maybe compressed; caBX
    WebP    chunks `XMP ` and C2PA
    AVIF    XMP as it stands in the file; the uuid box of C2PA
    others  XMP as it stands in the file
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from capstan.pipeline.image import jpeg
from capstan.pipeline.image.sniff import PNG_MAGIC, Unreadable

_APP1, _APP11 = 0xE1, 0xEB
_XMP: Final = b"http://ns.adobe.com/xap/1.0/\0"
_MORE_XMP: Final = b"http://ns.adobe.com/xmp/extension/\0"
_EXTENSION_HEADER: Final = len(_MORE_XMP) + 32 + 8  # GUID, full length, offset
_PNG_XMP: Final = b"XML:com.adobe.xmp\0"
_C2PA_BOX: Final = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")  # the uuid of C2PA's box in ISO media files
_MOST_XMP: Final = 4 << 20  # bytes of a compressed packet
_MOST_CHUNKS: Final = 100_000

Blocks = tuple[bytes, list[bytes]]  # all XMP, and JUMBF boxes


def blocks(kind: str, data: bytes) -> Blocks:
    """Return the XMP of an image file of a kind of `sniff`, and its JUMBF superboxes."""
    if kind == "jpeg":  # walking the segments before its scans is quicker than searching all of it for words
        return _of_jpeg(data)
    if b"jumb" not in data and b"DataMining" not in data and _PNG_XMP not in data and _MORE_XMP not in data:
        return b"", []  # nearly all files
    if kind == "png":
        return _of_png(data)
    if kind == "webp":
        return _of_webp(data)
    if kind == "avif" and (at := data.find(_C2PA_BOX)) >= 0 and (box := data.find(b"jumb", at, at + 256)) >= 4:
        return data, [data[box - 4 :]]
    return data, []


def _of_jpeg(data: bytes) -> Blocks:
    xmp: list[bytes] = []
    more: list[tuple[int, bytes]] = []
    boxes: dict[bytes, list[tuple[int, bytes]]] = defaultdict(list)  # by number of the box: (position, part)
    try:
        for segment in jpeg.before_scan(data):
            payload = segment.payload
            if segment.marker == _APP1 and payload.startswith(_XMP):
                xmp.append(payload[len(_XMP) :])
            elif segment.marker == _APP1 and payload.startswith(_MORE_XMP):
                offset = int.from_bytes(payload[_EXTENSION_HEADER - 4 : _EXTENSION_HEADER], "big")
                more.append((offset, payload[_EXTENSION_HEADER:]))
            elif segment.marker == _APP11 and payload[:2] == b"JP" and len(payload) > 16:
                boxes[payload[2:4]].append((int.from_bytes(payload[4:8], "big"), payload[8:]))
    except Unreadable:
        pass
    xmp += [part for _, part in sorted(more)]
    return b"".join(xmp), [_joined(sorted(parts)) for parts in boxes.values()]


def _joined(parts: list[tuple[int, bytes]]) -> bytes:
    """Return a box whose parts each repeat its header of 8 or, with a 64-bit length, 16 bytes."""
    first = parts[0][1]
    header = 16 if first[:4] == b"\0\0\0\1" else 8
    return b"".join([first, *(part[header:] for _, part in parts[1:])])


def _of_png(data: bytes) -> Blocks:
    xmp, boxes, at = b"", list[bytes](), len(PNG_MAGIC)
    for _ in range(_MOST_CHUNKS):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body, at = data[at + 8 : at + 8 + size], at + 12 + size
        if name == b"caBX":
            boxes.append(body)
        elif name == b"iTXt" and body.startswith(_PNG_XMP):
            xmp += _text(body[len(_PNG_XMP) :])
        if name in (b"IEND", b""):
            break
    return xmp[:_MOST_XMP], boxes


def _text(body: bytes) -> bytes:
    """Return the text of an iTXt chunk after its keyword (PNG, 11.3.3.4); b"" if it cannot be unpacked."""
    compressed, rest = body[:1] == b"\1", body[2:]
    text = rest.partition(b"\0")[2].partition(b"\0")[2]  # after language and translated keyword
    if not compressed:
        return text
    try:
        return zlib.decompressobj().decompress(text, _MOST_XMP)
    except zlib.error:
        return b""


def _of_webp(data: bytes) -> Blocks:
    found = list(_riff(data))
    xmp = b"".join(body for name, body in found if name == b"XMP ")
    return xmp, [body for name, body in found if name == b"C2PA"]


def _riff(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    for _ in range(_MOST_CHUNKS):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 > len(data):
            return
        yield data[at : at + 4], data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
