"""A file's first bytes → its container, or why it is not read; and whether it ends early

The container is forced on the demuxer, so that a file can never be taken for a playlist that names other files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from capstan.pipeline.errors import CapstanError

MOV: Final = "mov"
MATROSKA: Final = "matroska"
SOUNDS: Final = ("wav", "flac", "mp3", "ogg")  # containers that hold sound alone, as far as they are read

_BOXES: Final = frozenset([b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"uuid", b"styp"])
_STILL_BRANDS: Final = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_EBML: Final = b"\x1a\x45\xdf\xa3"
_SEGMENT: Final = b"\x18\x53\x80\x67"
_OTHERS: Final = {  # containers that are known and not read
    b"FLV\x01": "Flash video",
    b"\x00\x00\x01\xba": "an MPEG program stream",
    b"\x00\x00\x01\xb3": "a bare MPEG stream",
    b"\x30\x26\xb2\x75": "Windows Media",
    b".RMF": "RealMedia",
    b"#EXTM3U": "a playlist",
    b"\x47\x40": "an MPEG transport stream",
}


class UnreadableMedia(CapstanError):
    """Why a file yields no clip: `reason` is one of the ledger's reasons, `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def container_of(data: bytes) -> str:
    """Return the name of the demuxer for a file. Raises UnreadableMedia if it is not of a kind that is read."""
    if data[4:8] in _BOXES:
        if data[4:8] == b"ftyp" and data[8:12] in _STILL_BRANDS:
            raise UnreadableMedia("no_video", "it is a still image")
        return MOV
    if data.startswith(_EBML):
        return MATROSKA
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        return "wav"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        raise UnreadableMedia("unsupported", "the container AVI is not read")
    if data.startswith(b"fLaC"):
        return "flac"
    if data.startswith(b"OggS"):
        return "ogg"
    for start, name in _OTHERS.items():
        if data.startswith(start):
            raise UnreadableMedia("unsupported", f"{name} is not read")
    if data.startswith(b"ID3") or _is_mpeg_audio(data):
        return "mp3"
    raise UnreadableMedia("no_video", "it is neither a video nor a sound file")


def check_whole(data: bytes, container: str) -> None:
    """Raise UnreadableMedia if the container's own sizes say that the file ends early, or that it is encrypted."""
    if container == MOV:
        boxes = dict(_boxes(data))
        if b"moov" not in boxes and b"moof" not in boxes:
            raise UnreadableMedia("truncated", "it has no index (moov)")
        if b"encv" in boxes.get(b"moov", b"") or b"drmi" in boxes.get(b"moov", b""):
            raise UnreadableMedia("unsupported", "it is encrypted")
    elif container == MATROSKA:
        _check_segment(data)
    elif container == "wav":
        _check_wave(data)


def _is_mpeg_audio(data: bytes) -> bool:
    """Return whether a file starts with a frame of MPEG audio, layer III."""
    return len(data) > 2 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2 and data[2] >> 4 not in (0, 15)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, content) of the boxes at the top level (ISO 14496-12, 4.2); no content but that of the index."""
    at = 0
    while at + 8 <= len(data):
        size, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16])
        elif size == 0:  # to the end of the file
            size = len(data) - at
        if size < 8:
            if not any(data[at : at + 64]):  # padding
                return
            raise UnreadableMedia("corrupt", f"a box at byte {at} has {size} bytes")
        if at + size > len(data):
            raise UnreadableMedia("truncated", f"a box ends at byte {at + size}, the file at {len(data)}")
        yield name, data[at : at + size] if name == b"moov" else b""
        at += size


def _check_segment(data: bytes) -> None:
    """Compare the size of a Matroska file's segment with the file's; live recordings do not state one."""
    at = data.find(_SEGMENT, 4, 4096)
    if at < 0:
        raise UnreadableMedia("truncated", "it has no segment")
    at += len(_SEGMENT)
    length = 9 - data[at].bit_length() if at < len(data) and data[at] else 0
    raw = data[at : at + length]
    if len(raw) < max(1, length):
        raise UnreadableMedia("truncated", "it ends within its header")
    size = int.from_bytes(raw) & ((1 << 7 * length) - 1)
    if size != (1 << 7 * length) - 1 and at + length + size > len(data):
        raise UnreadableMedia("truncated", f"its segment ends at byte {at + length + size}, the file at {len(data)}")


def _check_wave(data: bytes) -> None:
    at = 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"data":
            if size not in (0, 0xFFFFFFFF) and at + 8 + size > len(data):
                raise UnreadableMedia("truncated", f"its samples end at byte {at + 8 + size}, the file at {len(data)}")
            return
        at += 8 + size + size % 2
    raise UnreadableMedia("truncated", "it has no samples")
