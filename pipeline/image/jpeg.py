"""JPEG segments → header fields, and a copy without metadata.

No pixel is decoded here. Marker names follow ITU-T T.81, table B.1.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from capstan.pipeline.image.sniff import Unreadable

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_APP0, _APP1, _APP2, _APP14, _COM = 0xE0, 0xE1, 0xE2, 0xEE, 0xFE
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn; not DHT, JPG, DAC
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD8)})  # TEM and RSTn have no length field
PROGRESSIVE: Final = frozenset({0xC2, 0xCA})
_AT_ONCE: Final = 1 << 16  # bytes that are searched by numpy, several times as fast as by re: they fit into a cache
_END: Final = b"\xff\xd9"
_MISSING: Final = 16  # more bits than a coefficient can be short of
_MARKER: Final = re.compile(rb"\xff[\x01-\xfe]")  # after fill bytes (FF) and stray zeros
_MOST_SEGMENTS: Final = 100_000  # encoders write a few dozen; metadata comes in segments of up to 64 kB
_USUAL_SCANS: Final = 20  # per file, whatever its size: encoders write 1 to 14
_MOST_DECODED: Final = 2_000_000_000  # pixels, summed over all scans
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
    ids: bytes  # of the components, in their order
    sampling: bytes  # of the components: horizontal factor × 16 + vertical factor


@dataclass(frozen=True, slots=True)
class Segment:
    """One marker with its payload; `scan` is the entropy-coded data that follows an SOS."""

    marker: int
    payload: bytes
    scan: bytes = b""


def read_header(data: bytes) -> Header:
    """Read the segments up to the first scan.

    Raises Unreadable: `truncated` if the file ends before it, `unsupported` for files that no common decoder reads (12
    bits per sample, lossless, hierarchical), `corrupt` if the segments make no sense.
    """
    exif, icc_parts, frame = b"", {}, None
    at = 2
    for count in itertools.count(1):
        _check_count(count)
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
    end = 6 + 3 * components
    return Header(process, width, height, components, exif, icc, body[6:end:3], body[7:end:3])


def _check_count(count: int) -> None:
    """Refuse files of so many segments that walking them would take seconds."""
    if count > _MOST_SEGMENTS:
        raise Unreadable("unsupported", f"more than {_MOST_SEGMENTS} JPEG segments")


def _segment(data: bytes, at: int) -> tuple[int, int, int]:
    """Return the next marker at or after `at`, and the start and end of its payload."""
    found = _MARKER.search(data, at)
    if found is None:
        raise Unreadable("truncated", "the JPEG ends between segments")
    at = found.start()
    marker = data[at + 1]
    if marker in _ALONE or marker in (_SOI, _EOI):
        return marker, at + 2, at + 2
    size = int.from_bytes(data[at + 2 : at + 4], "big")
    if at + 4 > len(data) or at + 2 + size > len(data):
        raise Unreadable("truncated", f"the JPEG ends in segment 0xff{marker:02x}")
    if size < 2:
        raise Unreadable("corrupt", f"JPEG segment 0xff{marker:02x} of impossible size")
    return marker, at + 4, at + 2 + size


def before_scan(data: bytes) -> Iterator[Segment]:
    """Yield the segments before the first scan. Raises Unreadable if the file ends there."""
    at = 2
    for count in itertools.count(1):
        _check_count(count)
        marker, start, at = _segment(data, at)
        if marker in (_SOS, _EOI):
            return
        yield Segment(marker, data[start:at])


def segments(data: bytes, *, needs_end: bool = True) -> Iterator[Segment]:
    """Yield the segments up to EOI. Raises Unreadable if the file ends before EOI, unless `needs_end` is false."""
    at = 2
    for count in itertools.count(1):
        _check_count(count)
        try:
            marker, start, end = _segment(data, at)
        except Unreadable:
            if needs_end:
                raise
            return
        if marker == _EOI:
            return
        at = end
        scan = b""
        if marker == _SOS:
            follower = _marker_in_scan(data, end)
            if follower is None and needs_end:
                raise Unreadable("truncated", "the JPEG ends in a scan")
            at = len(data) if follower is None else follower
            scan = data[end:].rstrip(b"\xff") if follower is None else data[end:at]
        yield Segment(marker, data[start:end], scan)


def _marker_in_scan(data: bytes, start: int) -> int | None:
    """Return where the scan that starts at `start` ends: at a marker that is not part of it, None if there is none.

    FF00 is a stuffed byte, FFD0 to FFD7 are restarts, and FFFF is a fill byte.
    """
    for first, second, at in _pairs(data, start):
        ends = (first == 0xFF) & ((second - 1 < 0xCF) | (second - 0xD8 < 0x27))  # uint8: 0 - 1 is 255
        place = int(ends.argmax()) if len(ends) else 0
        if len(ends) and ends[place]:
            return at + place
    return None


def _count_scans(data: bytes) -> int:
    """Count SOS markers, also those in other segments."""
    return sum(int(np.count_nonzero((first == 0xFF) & (second == _SOS))) for first, second, _ in _pairs(data, 0))


def _pairs(data: bytes, start: int) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], int]]:
    """Yield all bytes from `start` on with those after them, a block at a time, and where the block starts."""
    whole = np.frombuffer(data, np.uint8)
    for at in range(start, len(data) - 1, _AT_ONCE):
        yield whole[at : at + _AT_ONCE][: len(data) - 1 - at], whole[at + 1 : at + 1 + _AT_ONCE], at


def strip(data: bytes) -> bytes:
    """Return the image without its metadata: no EXIF, GPS, XMP, ICC, comments, thumbnails or trailing data.

    Everything that decoding needs is kept, byte for byte: tables, frame and scan headers, entropy-coded data, JFIF
    density (without its thumbnail) and Adobe's colour transform flag. Raises Unreadable if the file ends before its EOI
    marker.
    """
    return _joined(map(_bare, segments(data)))


def is_bare(data: bytes) -> bool:
    """Return whether `strip` would change nothing, without copying the image. Raises Unreadable as `strip` does."""
    at = 2
    for count in itertools.count(1):
        _check_count(count)
        marker, start, end = _segment(data, at)
        if start - at != (2 if marker == _EOI else 4):  # stray bytes, or a marker without a length
            return False
        if marker == _EOI:
            return end == len(data)
        segment = Segment(marker, data[start:end])
        if _bare(segment) != segment:
            return False
        at = end
        if marker == _SOS:
            if (follower := _marker_in_scan(data, end)) is None:
                raise Unreadable("truncated", "the JPEG ends in a scan")
            at = follower
    raise AssertionError("count is endless")


def tidy(data: bytes, header: Header) -> bytes:
    """Return the image without the faults that change no pixel, so that a strict decoder accepts it if it is whole.

    Metadata and stray bytes between segments are removed, and a missing EOI is added. Header fields that every decoder
    ignores get their usual value: JFIF version, unknown Adobe transform, spectral range of a sequential scan. Raises
    Unreadable for an arithmetic-coded file without EOI: its decoder cannot tell whether data is missing.
    """
    found = segments(data, needs_end=header.process not in HUFFMAN)
    return _joined(_usual(_bare(segment), header) for segment in found)


def without_padding(tidied: bytes) -> list[bytes]:
    """Return the image without the repeated byte that pads its last scan, then with one such byte left.

    Some cameras pad files to a fixed size with zeros before EOI. The data itself may end in the same byte.
    """
    body = tidied[: -len(_END)]
    last = body[-1:]
    bare = body.rstrip(last)
    if bare.endswith(b"\xff"):
        bare += last  # FF00 is a data byte
    return [bare + _END, bare + last + _END] if len(body) - len(bare) > 1 else []


def _bare(segment: Segment) -> Segment | None:
    """Return the segment without its metadata; None if it holds nothing else."""
    marker, payload = segment.marker, segment.payload
    if marker == _APP0 and payload[:5] == b"JFIF\0" and len(payload) >= 12:
        return Segment(_APP0, payload[:12] + b"\0\0")
    if marker == _APP14 and payload[:5] == b"Adobe" and len(payload) >= 12:
        return Segment(_APP14, payload[:12])
    metadata = _APP0 <= marker <= 0xEF or marker in (_COM, _SOI) or marker in _ALONE
    return None if metadata else segment


def _usual(segment: Segment | None, header: Header) -> Segment | None:
    if segment is None:
        return None
    marker, payload = segment.marker, segment.payload
    if marker == _APP0:
        payload = payload[:5] + b"\1\1" + payload[7:]
    elif marker == _APP14 and payload[11] > 2:
        payload = payload[:11] + bytes([2 if header.components == 4 else 1])
    elif marker == _SOS and header.process not in PROGRESSIVE:
        payload = payload[:-3] + b"\0\x3f\0"
    return Segment(marker, payload, segment.scan)


def _joined(parts: Iterable[Segment | None]) -> bytes:
    return b"\xff\xd8" + b"".join(_compose(part) for part in parts if part is not None) + _END


def _compose(segment: Segment) -> bytes:
    size = (len(segment.payload) + 2).to_bytes(2, "big")
    return bytes((0xFF, segment.marker)) + size + segment.payload + segment.scan


def check_scans(data: bytes, header: Header) -> None:
    """Check that the file is large enough for its pixels and, if it has several scans, their number and completeness.

    Raises Unreadable: `unsupported` if decoding the scans would take far longer than any real file does, `truncated` if
    a component, or part of its coefficients, is not sent in full.
    """
    blocks = -(-header.width // 8) * -(-header.height // 8)
    if header.process in HUFFMAN and 8 * len(data) < blocks:  # a Huffman code has one bit at least
        raise Unreadable("truncated", f"{len(data)} bytes cannot hold {blocks} blocks of pixels")
    if header.process not in PROGRESSIVE and _count_scans(data) == 1:
        return
    most = max(_USUAL_SCANS, _MOST_DECODED // (header.width * header.height))
    missing = {id_: [_MISSING] * 64 for id_ in header.ids}  # bits of each coefficient that are still to come
    count = 0
    for segment in segments(data, needs_end=False):
        if segment.marker != _SOS:
            continue
        count += 1
        if count > most:
            raise Unreadable("unsupported", f"more than {most} scans of {header.width} x {header.height} pixels")
        ids, first, last, approximation = _scan_header(segment.payload)
        if header.process not in PROGRESSIVE:
            first, last, approximation = 0, 63, 0
        for id_ in ids:
            for coefficient in range(first, last + 1) if id_ in missing else ():
                before, missing[id_][coefficient] = approximation >> 4, approximation & 15
                if before and before != missing[id_][coefficient] + 1:
                    raise Unreadable("corrupt", "a scan refines bits out of order")
    if any(bits for left in missing.values() for bits in left):
        raise Unreadable("truncated", f"scans are missing after the first {count}")


def _scan_header(payload: bytes) -> tuple[bytes, int, int, int]:
    """Return component ids, first and last coefficient, and the bits of approximation (T.81, B.2.3)."""
    if not payload or len(payload) != 4 + 2 * payload[0] or payload[-3] > payload[-2] or payload[-2] > 63:
        raise Unreadable("corrupt", "JPEG scan header of impossible content")
    return payload[1:-3:2], payload[-3], payload[-2], payload[-1]


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
