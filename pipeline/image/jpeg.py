"""JPEG segments → header fields, and a copy without metadata.

No pixel is decoded here. Marker names follow ITU-T T.81, table B.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from capstan.pipeline.image.sniff import Unreadable

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_APP0, _APP1, _APP2, _APP14, _COM = 0xE0, 0xE1, 0xE2, 0xEE, 0xFE
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn; not DHT, JPG, DAC
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD8)})  # TEM and RSTn have no length field
_MARKER_IN_SCAN: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # FF00 is a stuffed byte, FFD0–FFD7 restart
HUFFMAN: Final = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive
_DECODED: Final = HUFFMAN | {0xC9, 0xCA}  # arithmetic: sequential, progressive


@dataclass(frozen=True, slots=True)
class Header:
    """Everything before the first scan. `exif` is the TIFF structure and `icc` the profile, b"" if absent."""

    process: int  # the SOFn marker
    width: int
    height: int
    components: int
    exif: bytes
    icc: bytes


def read_header(data: bytes) -> Header:
    """Read the segments up to the first scan.

    Raises Unreadable: `truncated` if the file ends before it, `unsupported` for files that no common decoder reads (12
    bits per sample, lossless, hierarchical), `corrupt` if the segments make no sense.
    """
    exif, icc_parts, frame = b"", {}, None
    at = 2
    while True:
        marker, start, end = _segment(data, at)
        if marker in _FRAMES and frame is None:
            frame = (marker, data[start:end])
        elif marker == _APP1 and not exif and data.startswith(b"Exif\0\0", start):
            exif = data[start + 6 : end]
        elif marker == _APP2 and data.startswith(b"ICC_PROFILE\0", start) and end - start > 14:
            icc_parts[data[start + 12]] = data[start + 14 : end]
        elif marker == _SOS:
            break
        elif marker == _EOI:
            raise Unreadable("corrupt", "no image between the JPEG's markers")
        at = end
    if frame is None or len(frame[1]) < 6:
        raise Unreadable("corrupt", "JPEG scan without a frame header")
    process, body = frame
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    precision, components = body[0], body[5]
    if process not in _DECODED or precision != 8 or components not in (1, 3, 4) or height == 0:
        detail = f"JPEG process SOF{process - 0xC0}, {precision} bits, {components} components, height {height}"
        raise Unreadable("unsupported", detail)
    icc = b"".join(icc_parts[number] for number in sorted(icc_parts))
    return Header(process, width, height, components, exif, icc)


def _segment(data: bytes, at: int) -> tuple[int, int, int]:
    """Return the next marker at or after `at`, and the start and end of its payload."""
    at = data.find(b"\xff", at)
    while 0 <= at < len(data) - 1 and data[at + 1] in (0xFF, 0x00):  # fill bytes, stray zeros
        at = data.find(b"\xff", at + 1)
    if at < 0 or at + 1 >= len(data):
        raise Unreadable("truncated", "the JPEG ends between segments")
    marker = data[at + 1]
    if marker in _ALONE or marker in (_SOI, _EOI):
        return marker, at + 2, at + 2
    size = int.from_bytes(data[at + 2 : at + 4], "big")
    if at + 4 > len(data) or at + 2 + size > len(data):
        raise Unreadable("truncated", f"the JPEG ends in segment 0xff{marker:02x}")
    if size < 2:
        raise Unreadable("corrupt", f"JPEG segment 0xff{marker:02x} of impossible size")
    return marker, at + 4, at + 2 + size


def strip(data: bytes) -> bytes:
    """Return the image without its metadata: no EXIF, GPS, XMP, ICC, comments, thumbnails or trailing data.

    Everything that decoding needs is kept, byte for byte: tables, frame and scan headers, entropy-coded data, JFIF
    density (without its thumbnail) and Adobe's colour transform flag. Raises Unreadable if the file ends before its EOI
    marker.
    """
    parts, at = [b"\xff\xd8"], 2
    while True:
        marker, start, end = _segment(data, at)
        payload = data[start:end]
        at = end
        if marker == _EOI:
            parts.append(b"\xff\xd9")
            return b"".join(parts)
        if marker == _APP0 and payload[:5] == b"JFIF\0" and len(payload) >= 12:
            parts.append(_compose(_APP0, payload[:12] + b"\0\0"))
        elif marker == _APP14 and payload[:5] == b"Adobe" and len(payload) >= 12:
            parts.append(_compose(_APP14, payload[:12]))
        elif marker == _SOS:
            follower = _MARKER_IN_SCAN.search(data, end)
            if follower is None:
                raise Unreadable("truncated", "the JPEG ends in a scan")
            parts.append(_compose(_SOS, payload) + data[end : follower.start()])
            at = follower.start()
        elif not (_APP0 <= marker <= 0xEF or marker in (_COM, _SOI) or marker in _ALONE):
            parts.append(_compose(marker, payload))


def _compose(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2, "big") + payload


def has_end(data: bytes) -> bool:
    """Return whether every segment up to EOI is present."""
    try:
        strip(data)
    except Unreadable:
        return False
    return True


def orientation(exif: bytes) -> int:
    """Return the EXIF orientation, 1 to 8, from a TIFF structure (tag 0x0112 of IFD0); 1, upright, if it has none."""
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], "little" if exif[0] == ord("I") else "big")

    first = number(4, 4)
    for index in range(number(first, 2)):
        entry = first + 2 + 12 * index
        if entry + 12 > len(exif):
            break
        if number(entry, 2) == 0x0112:
            value = number(entry + 8, 2)  # a SHORT is in the first two bytes of the value field
            return value if 1 <= value <= 8 else 1
    return 1
