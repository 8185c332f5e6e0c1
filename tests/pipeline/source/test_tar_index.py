"""Files in tars of every kind of writer lie where `tarfile` says; damage is never taken for the end."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from capstan.pipeline.source.tar_index import BLOCK, fits, is_of, members

FILES = [(f"{n:03}.jpg", bytes([n]) * (n * 97)) for n in range(40)]


def tar_of(form: int, files: list[tuple[str, bytes]], **fields: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def read(raw: bytes) -> list[tuple[str, bytes]]:
    found = members(io.BytesIO(raw))
    return [(member.name, raw[member.offset : member.offset + member.size]) for member in found]


FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("fields", [{}, {"mtime": 1.5}, {"uname": "käthe", "uid": 1 << 30}])
def test_every_format(form: int, fields: dict[str, Any]) -> None:
    if form == tarfile.USTAR_FORMAT and fields:
        fields = {"mtime": 1}
    names = [("folder/" * 20 + "deep.jpg", b"deep"), ("é/ü.jpg", b"umlaut")]
    files = [
        *FILES,
        *names,
        *([] if form == tarfile.USTAR_FORMAT else [("x" * 300 + ".jpg", b"long")]),
        ("z.jpg", b"z"),
    ]
    assert read(tar_of(form, files, **fields)) == files


LONG = ["x" * 100 + ".jpg", "ü" * 70 + ".jpg", "folder/" * 90 + "deep.jpg"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("fields", [{}, {"pax_headers": {"SCHILY.xattr.user.note": "n" * 600}}])
def test_what_lies_before_a_file_tells_whose_bytes_they_are(form: int, fields: dict[str, Any]) -> None:
    names = ["a.jpg", "é.jpg", "folder/b.jpg", *(LONG if form != tarfile.USTAR_FORMAT else [])]
    raw = tar_of(form, [(name, b"12345") for name in names], **fields)
    for member in members(io.BytesIO(raw)):
        before = raw[max(0, member.offset - (1 if fits(member.name) else 2) * BLOCK) : member.offset]
        assert is_of(before, member.name, 5)
        assert not is_of(before, member.name, 4)
        assert not is_of(before, "b.jpg", 5)
        if not fields:
            assert not any(is_of(before, name, 5) for name in names if name != member.name)
    assert not is_of(raw[member.offset : member.offset + BLOCK], member.name, 5)


def test_what_webdataset_writes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "t.tar")) as writer:
        for name, data in FILES:
            writer.write({"__key__": name[:-4], "bin": data})
    assert read((tmp_path / "t.tar").read_bytes()) == [(name.replace("jpg", "bin"), data) for name, data in FILES]


def test_links_are_named_and_folders_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"a")
    (tmp_path / "in" / "b.jpg").symlink_to("a.jpg")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(tmp_path / "in", "in")
    with (tmp_path / "t.tar").open("rb") as file:
        found = {member.name: (member.size, member.link) for member in members(file)}
    assert found == {"in/a.jpg": (1, ""), "in/b.jpg": (0, "a.jpg")}


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_negative_size_is_damage(kind: bytes) -> None:
    """It would lead back to a header before it, without end."""
    raw = bytearray(tar_of(tarfile.GNU_FORMAT, FILES[:3]))
    raw[1024 + 512 + 124 : 1024 + 512 + 136] = b"\xff" * 10 + (-1024).to_bytes(2, "big", signed=True)
    raw[1024 + 512 + 156 : 1024 + 512 + 157] = kind
    header = tarfile.TarInfo.frombuf
    checksum = sum(raw[1536:2048]) - sum(raw[1536 + 148 : 1536 + 156]) + 8 * ord(" ")
    raw[1536 + 148 : 1536 + 156] = b"%06o\0 " % checksum
    assert header(bytes(raw[1536:2048]), "utf-8", "strict").size == -1024
    with pytest.raises(tarfile.ReadError, match="negative size"):
        read(bytes(raw))


def test_a_tar_without_its_end_mark_is_whole() -> None:
    raw = tar_of(tarfile.USTAR_FORMAT, FILES[:3])
    assert read(raw[: 512 + 512 * 2 + 512 * 2]) == FILES[:3]  # three headers; 0, 97 and 194 bytes


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [0, 100, 700, 20_000, 20_480, 25_100])
def test_a_cut_tar_is_refused(form: int, size: int) -> None:
    raw = tar_of(form, [(name, data + bytes(600)) for name, data in FILES], mtime=1.5 if form == FORMATS[2] else 1)
    with pytest.raises(tarfile.ReadError):
        read(raw[: size + 1 if size else 0])


@pytest.mark.parametrize("where", [0, 10])
def test_a_damaged_header_is_refused(where: int) -> None:
    raw = bytearray(tar_of(tarfile.USTAR_FORMAT, FILES))
    offset = [member.offset for member in members(io.BytesIO(bytes(raw)))][where]
    raw[offset - 512 + 130] ^= 1  # in the size
    with pytest.raises(tarfile.ReadError):
        read(bytes(raw))


@pytest.mark.parametrize("where", [0, 10])
@pytest.mark.parametrize("at", [131, 150])  # in the size, in the checksum
def test_a_number_with_a_9_is_damage(where: int, at: int) -> None:
    raw = bytearray(tar_of(tarfile.USTAR_FORMAT, FILES))
    header = [member.offset for member in members(io.BytesIO(bytes(raw)))][where] - BLOCK
    added = ord("9") - raw[header + at]
    raw[header + at] = ord("9")
    if at == 131:
        raw[header + 148 : header + 155] = b"%06o\0" % (int(raw[header + 148 : header + 154], 8) + added)
    with pytest.raises(tarfile.ReadError):
        read(bytes(raw))
    assert not is_of(bytes(raw[header : header + BLOCK]), FILES[where][0], len(FILES[where][1]))
