"""Tar → the position of each file's bytes

Headers as WebDataset writers write them are read here, several times as fast as `tarfile` does; anything unusual is
left to `tarfile`. Unlike `tarfile`, it never takes damage for the end of the archive.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Final, NamedTuple

from capstan.pipeline.source.columns import text_of

BLOCK: Final = tarfile.BLOCKSIZE
_ZEROS: Final = bytes(BLOCK)
_NAME_BYTES: Final = 100
_RECORD: Final = re.compile(r"\d+ [\w.]+=[^\n]*\n\Z")  # a record of an extended header
_FILE: Final = (tarfile.REGTYPE, tarfile.AREGTYPE)
# Fields of extended headers that replace those of a file's own header. Times and owners do not matter here.
_REPLACING: Final = (b"path=", b"size=", b"linkpath=", b"GNU.", b"hdrcharset=")


class Member(NamedTuple):
    """A file in a tar: `size` bytes at `offset`. A link to `link` has no bytes of its own."""

    name: str
    offset: int
    size: int
    link: str = ""


def members(stream: BinaryIO) -> Iterator[Member]:
    """Yield the files and links of an uncompressed tar, in order; the caller may seek in `stream` between two of them.

    Raises tarfile.ReadError if it is not a tar, is damaged or is cut.
    """
    at, end = 0, stream.seek(0, 2)
    while at + BLOCK <= end:
        stream.seek(at)
        header = stream.read(BLOCK)
        if header == _ZEROS:
            return
        kind, name, size = _plain(header)
        if not kind or (kind == tarfile.XHDTYPE and _replaces(stream.read(size))):
            member, at = _by_tarfile(stream, at)
        else:
            member = Member(name, at + BLOCK, size) if kind in _FILE else None
            at += BLOCK + -(-size // BLOCK) * BLOCK
        if member is not None:
            yield member
    if at != end or not end:
        raise tarfile.ReadError("it ends early")


def is_of(before: bytes, name: str, size: int) -> bool:
    """Return whether a file in a tar has this name (as returned by `text_of`) and size.

    `before` is the one or two blocks before the file's bytes: its header, and the block that holds a name which does
    not fit in a header.
    """
    header, longer = before[-BLOCK:], before[:-BLOCK].rstrip(b"\0")
    kind, found, length = _plain(header)
    if not kind:
        try:
            other = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        found, length = other.name, other.size if other.isfile() else -1
    if length != size:
        return False
    if text_of(found) == name:
        return True
    longer = longer.lstrip(bytes(range(0x80, 0xC0)))  # the rest of a letter that started in the block before
    record = text_of(longer.decode("utf-8", "surrogateescape"))
    if " path=" in record:  # POSIX's extended header
        return f" path={name}\n" in record
    if fits(name) or not record:
        return False
    # GNU's long name, or its end; or an extended header of several blocks, when only the last was read
    return name.endswith(record.removesuffix("\n")) or _RECORD.search(record) is not None


def fits(name: str) -> bool:
    """Return whether every writer puts this name into a file's own header."""
    return name.isascii() and len(name) <= _NAME_BYTES


def _plain(header: bytes) -> tuple[bytes, str, int]:
    """Return type, name and size of a file or extended header (POSIX.1-2001, ustar); type b"" for anything else."""
    kind, digits = header[156:157], header[124:136].rstrip(b" \0")
    known = header[257:262] == b"ustar" and (kind in _FILE or kind == tarfile.XHDTYPE) and digits.isdigit()
    name, prefix = header[:_NAME_BYTES].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    try:
        size = int(digits, 8) if known and not name.endswith(b"/") and _checksum_holds(header) else -1
    except ValueError:  # an 8 or a 9 is damage
        size = -1
    if size < 0:
        return b"", "", 0
    if prefix and header[257:263] == tarfile.POSIX_MAGIC[:6]:  # GNU tar stores other fields there
        name = prefix + b"/" + name
    return kind, name.decode("utf-8", "surrogateescape"), size


def _replaces(extended: bytes) -> bool:
    return any(key in extended for key in _REPLACING)


def _checksum_holds(header: bytes) -> bool:
    """Return whether the header's checksum is the sum of its bytes, with the checksum field itself taken as spaces.

    Compared modulo 65521: the lower half of Adler-32 is such a sum plus 1 (RFC 1950), and much faster than `sum`.
    Raises ValueError if the checksum is not an octal number.
    """
    field = header[148:156]
    stated = field.strip(b" \0")
    total = (zlib.adler32(header) & 0xFFFF) - (zlib.adler32(field) & 0xFFFF) + len(field) * ord(" ")
    return stated.isdigit() and (total - int(stated, 8)) % 65521 == 0


def _by_tarfile(stream: Any, start: int) -> tuple[Member | None, int]:
    """Return the file or link whose header is at `start` (else None), and the offset of the next header."""
    stream.seek(start)
    with contextlib.suppress(tarfile.HeaderError):  # which `open` will report
        if tarfile.nti(stream.read(BLOCK)[124:136]) < 0:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"a negative size at byte {start}")
    stream.seek(start)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        found = tar.firstmember  # type: ignore[attr-defined] # read on opening, with all its extended headers
        if found is None:
            raise tarfile.ReadError(f"no header at byte {start}")
        member = Member(found.name, found.offset_data, found.size) if found.isfile() else None
        if found.islnk() or found.issym():
            member = Member(found.name, found.offset_data, 0, found.linkname)
        if tar.offset <= start:
            raise tarfile.ReadError(f"a header at byte {start} that leads back")
        return member, tar.offset
