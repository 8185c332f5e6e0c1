"""Folders of pictures, and WebDataset tars → rows. The pictures stay where they are; a row says where its bytes lie."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

from pipeline.config import Source
from pipeline.errors import RecipeError
from pipeline.sources.columns import Row, text_of, to_json
from pipeline.storage import SourceFile

IMAGES = frozenset([".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif"])

Open = Callable[[str], Any]


def folder(files: list[SourceFile], source: Source, open_: Open) -> Iterator[Row]:
    """Pictures with NAME.txt or NAME.json beside them; .txt has the caption, .json the caption and other fields."""
    pictures = [file for file in files if PurePosixPath(file.path).suffix.lower() in IMAGES]
    if not pictures:
        kinds = ", ".join(sorted(IMAGES))
        raise RecipeError("source.path", f"no picture at {source.path}", f"name a folder with files of {kinds}")
    beside = {file.path for file in files}
    for file in pictures:
        stem = file.path.removesuffix(PurePosixPath(file.path).suffix)
        record = _json_object(_read(open_, f"{stem}.json")) if f"{stem}.json" in beside else {}
        caption = text_of(record.pop(source.caption, None))
        if f"{stem}.txt" in beside:
            caption = _read(open_, f"{stem}.txt").decode("utf-8", "replace").strip()
        yield _row(file.path, caption, file.path, 0, file.size, record, source)


def webdataset(file: SourceFile, source: Source, open_: Open) -> Iterator[Row]:
    """The samples of a tar: KEY.jpg (or another picture) with KEY.txt and KEY.json beside it."""
    _refuse_packed(file, open_)
    with open_(file.path) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for _, members in itertools.groupby((m for m in tar if m.isfile()), key=_sample_name):
                    yield from _sample(list(members), tar, file, source)
                    tar.members.clear()  # type: ignore[attr-defined] # or else it keeps all that it has seen
        except tarfile.ReadError as error:
            problem = f"{file.path} is not a tar, or is cut ({error})"
            raise RecipeError("source.path", problem, "replace or remove the file") from None


def _refuse_packed(file: SourceFile, open_: Open) -> None:
    """Pictures are read by byte range, which a compressed file does not allow."""
    with open_(file.path) as stream:
        magic = stream.read(6)
    for start, command in _PACKED.items():
        if magic.startswith(start):
            problem = f"{file.path} is compressed, and pictures in tars are read in place"
            raise RecipeError("source.path", problem, f"unpack it first: {command} {PurePosixPath(file.path).name}")


_PACKED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz"}


def _sample(members: list[tarfile.TarInfo], tar: tarfile.TarFile, file: SourceFile, source: Source) -> Iterator[Row]:
    picture, caption, record = None, "", dict[str, Any]()
    for member in members:
        suffix = PurePosixPath(member.name).suffix.lower()
        if suffix in IMAGES and picture is None:
            picture = member
        elif suffix == ".txt":
            caption = _member(tar, member).decode("utf-8", "replace").strip()
        elif suffix == ".json":
            record = _json_object(_member(tar, member))
    if picture is None:
        return
    caption = caption or text_of(record.get(source.caption))
    record.pop(source.caption, None)
    url = f"{file.path}#{picture.name}"
    yield _row(url, caption, file.path, picture.offset_data, picture.size, record, source)


def _row(url: str, caption: str, file: str, offset: int, length: int, record: dict[str, Any], source: Source) -> Row:
    hash_ = text_of(record.get(source.hash)).strip() if source.hash else ""
    return Row(text_of(url), caption, None, text_of(file), offset, length, to_json(record), hash_)


def _sample_name(member: tarfile.TarInfo) -> str:
    """What the members of a sample share: the path up to the last dot of the file name."""
    return member.name[: -len(suffix)] if (suffix := PurePosixPath(member.name).suffix) else member.name


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    return stream.read() if stream else b""


def _read(open_: Open, path: str) -> bytes:
    with open_(path) as stream:
        return bytes(stream.read())


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
