"""The tar reader: positions of members, and the rows of a WebDataset tar."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from contextlib import suppress

from drawn import file_of, ramp

from capstan.pipeline.config import Source
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source import folders
from capstan.pipeline.source.tar_index import Member, is_of, members
from capstan.pipeline.storage.listing import SourceFile

SUFFIXES = (".tar",)
WORDS = [b"ustar\x0000", b"ustar  \0", b"0000644\0", b"30 path=", b"12 size=9\n", b"GNU.sparse.map=0,1", b"\x80\0\0\0"]
LONGEST = 1 << 15
_SOURCE = Source(path="a.tar", format="webdataset")


def seeds() -> list[bytes]:
    image = file_of(ramp(24, 16), "jpeg")
    plain = [("0.jpg", image), ("0.txt", b"a caption"), ("0.json", b'{"caption": "b", "score": [1]}'), ("1.png", b"x")]
    named = [("folder/" * 20 + "a.jpg", image), ("é/ü.JPG", b""), ("x" * 300 + ".txt", b"long"), ("._0.jpg", b"mac")]
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    tars = [_tar(plain, form) for form in formats] + [_tar(named, form) for form in formats[1:]]
    sparse = bytearray(_tar(plain, tarfile.GNU_FORMAT))
    sparse[156:157] = tarfile.GNUTYPE_SPARSE
    return [*tars, bytes(sparse), _links(), tars[0][:700], b""]


def check(data: bytes) -> None:
    found: list[Member] = []
    with suppress(tarfile.ReadError):
        for member in members(io.BytesIO(data)):
            found.append(member)
            is_of(data[max(member.offset - 1024, 0) : member.offset], member.name, member.size)
        assert all(_is_within(member.offset, member.size, data) for member in found)
    assert len(found) <= len(data) // 512
    file = SourceFile("a.tar", len(data), "")
    with suppress(RecipeError):
        for row in list(folders.webdataset(file, _SOURCE, lambda _: io.BytesIO(data), Counter())):
            assert _is_within(row.offset, row.length, data), row
            "".join((row.url, row.caption, row.extra)).encode()  # plain text, which a table can hold


def _is_within(start: int, size: int, data: bytes) -> bool:
    return 0 <= start <= start + size <= len(data)


def _tar(files: list[tuple[str, bytes]], form: int) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return target.getvalue()


def _links() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "a.jpg"), (tarfile.LNKTYPE, "b.txt"), (tarfile.DIRTYPE, "c")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
    return target.getvalue()
