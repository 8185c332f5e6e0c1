"""A tar → its files: where each one's bytes lie. What WebDataset writers write is read here, several times as fast as
`tarfile` does; what is out of the ordinary is left to `tarfile`. Unlike that, it never takes damage for the end.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, Final, NamedTuple

_BLOCK: Final = tarfile.BLOCKSIZE
_ZEROS: Final = bytes(_BLOCK)
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
    while at + _BLOCK <= end:
        stream.seek(at)
        header = stream.read(_BLOCK)
        if header == _ZEROS:
            return
        kind, name, size = _plain(header)
        if not kind or (kind == tarfile.XHDTYPE and _tells(stream.read(size))):
            member, at = _by_tarfile(stream, at)
        else:
            member = Member(name, at + _BLOCK, size) if kind in _FILE else None
            at += _BLOCK + -(-size // _BLOCK) * _BLOCK
        if member is not None:
            yield member
    if at != end or not end:
        raise tarfile.ReadError("it ends early")


def _plain(header: bytes) -> tuple[bytes, str, int]:
    """Type, name and size of a file or an extended header (POSIX.1-2001, ustar); the type is b"" for anything else."""
    kind, size = header[156:157], header[124:136].rstrip(b" \0")
    known = header[257:262] == b"ustar" and (kind in _FILE or kind == tarfile.XHDTYPE) and size.isdigit()
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    if not known or name.endswith(b"/") or not _checksum_holds(header):
        return b"", "", 0
    if prefix and header[257:263] == tarfile.POSIX_MAGIC[:6]:  # GNU has other fields there
        name = prefix + b"/" + name
    return kind, name.decode("utf-8", "surrogateescape"), int(size, 8)


def _tells(extended: bytes) -> bool:
    return any(key in extended for key in _TELLING)


def _checksum_holds(header: bytes) -> bool:
    """The sum of all bytes of the header, its own field taken as spaces."""
    stated = header[148:156].strip(b" \0")
    return stated.isdigit() and sum(header) - sum(header[148:156]) + 8 * ord(" ") == int(stated, 8)


def _by_tarfile(stream: Any, start: int) -> tuple[Member | None, int]:
    """The file whose header is at `start` (None for a folder or a link), and where the next header is."""
    stream.seek(start)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        found = tar.firstmember  # type: ignore[attr-defined] # read on opening, with all its extended headers
        if found is None:
            raise tarfile.ReadError(f"no header at byte {start}")
        member = Member(found.name, found.offset_data, found.size) if found.isfile() else None
        return member, tar.offset
