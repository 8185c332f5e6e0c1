"""A tar → its files: where each one's bytes lie. What WebDataset writers write is read here, several times as fast as
`tarfile` does; what is out of the ordinary is left to `tarfile`. Unlike that, it never takes damage for the end.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Final, NamedTuple

from capstan.pipeline.source.columns import text_of

BLOCK: Final = tarfile.BLOCKSIZE
_ZEROS: Final = bytes(BLOCK)
_NAME_BYTES: Final = 100
_RECORD: Final = re.compile(r"\d+ [\w.]+=[^\n]*\n\Z")  # of an extended header
_FILE: Final = (tarfile.REGTYPE, tarfile.AREGTYPE)
# What extended headers may say of a file instead of its own header. They also tell times and owners, which nobody asks.
_TELLING: Final = (b"path=", b"size=", b"linkpath=", b"GNU.", b"hdrcharset=")


class Member(NamedTuple):
    """A file in a tar: `size` bytes at `offset`, both in bytes."""

    name: str
    offset: int
    size: int


def members(stream: BinaryIO) -> Iterator[Member]:
    """The files of an uncompressed tar, in order; `stream` may be read elsewhere meanwhile.

    Raises tarfile.ReadError where it is no tar, is damaged or is cut.
    """
    at, end = 0, stream.seek(0, 2)
    while at + BLOCK <= end:
        stream.seek(at)
        header = stream.read(BLOCK)
        if header == _ZEROS:
            return
        kind, name, size = _plain(header)
        if not kind or (kind == tarfile.XHDTYPE and _tells(stream.read(size))):
            member, at = _by_tarfile(stream, at)
        else:
            member = Member(name, at + BLOCK, size) if kind in _FILE else None
            at += BLOCK + -(-size // BLOCK) * BLOCK
        if member is not None:
            yield member
    if at != end or not end:
        raise tarfile.ReadError("it ends early")


def is_of(before: bytes, name: str, size: int) -> bool:
    """Whether `before`, the one or two blocks that lie before a file's bytes, say that it is called `name` (as text_of
    gives it) and has `size` bytes. Names that the header cannot hold stand in the block before it."""
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
    longer = longer.lstrip(bytes(range(0x80, 0xC0)))  # the rest of a letter that began in the block before
    said = text_of(longer.decode("utf-8", "surrogateescape"))
    if " path=" in said:  # POSIX's extended header
        return f" path={name}\n" in said
    if fits(name) or not said:
        return False
    # GNU's long name, or its end; or an extended header of several blocks, of which only the last was read
    return name.endswith(said.removesuffix("\n")) or _RECORD.search(said) is not None


def fits(name: str) -> bool:
    """Whether every writer puts this name into a file's own header."""
    return name.isascii() and len(name) <= _NAME_BYTES


def _plain(header: bytes) -> tuple[bytes, str, int]:
    """Type, name and size of a file or an extended header (POSIX.1-2001, ustar); the type is b"" for anything else."""
    kind, digits = header[156:157], header[124:136].rstrip(b" \0")
    known = header[257:262] == b"ustar" and (kind in _FILE or kind == tarfile.XHDTYPE) and digits.isdigit()
    name, prefix = header[:_NAME_BYTES].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    try:
        size = int(digits, 8) if known and not name.endswith(b"/") and _checksum_holds(header) else -1
    except ValueError:  # an 8 or a 9 is damage
        size = -1
    if size < 0:
        return b"", "", 0
    if prefix and header[257:263] == tarfile.POSIX_MAGIC[:6]:  # GNU has other fields there
        name = prefix + b"/" + name
    return kind, name.decode("utf-8", "surrogateescape"), size


def _tells(extended: bytes) -> bool:
    return any(key in extended for key in _TELLING)


def _checksum_holds(header: bytes) -> bool:
    """Whether it is the sum of all bytes of the header, its own field taken as spaces. Compared modulo 65521, since the
    lower half of Adler-32 is such a sum plus 1 (RFC 1950), and had much sooner than by `sum`.

    Raises ValueError where it is no octal number.
    """
    field = header[148:156]
    stated = field.strip(b" \0")
    total = (zlib.adler32(header) & 0xFFFF) - (zlib.adler32(field) & 0xFFFF) + len(field) * ord(" ")
    return stated.isdigit() and (total - int(stated, 8)) % 65521 == 0


def _by_tarfile(stream: Any, start: int) -> tuple[Member | None, int]:
    """The file whose header is at `start` (None for a folder or a link), and where the next header is."""
    stream.seek(start)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        found = tar.firstmember  # type: ignore[attr-defined] # read on opening, with all its extended headers
        if found is None:
            raise tarfile.ReadError(f"no header at byte {start}")
        member = Member(found.name, found.offset_data, found.size) if found.isfile() else None
        return member, tar.offset
