"""Folders of images, and WebDataset tars → rows. The images stay where they are; a row says where its bytes lie."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from capstan.pipeline.config import Source
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source.columns import Row, caption_of, text_of, to_json
from capstan.pipeline.source.tar_index import Member, members
from capstan.pipeline.storage.listing import SourceFile

IMAGES = frozenset([".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif"])
_BESIDE = frozenset([".txt", ".json"])  # what says something of the image of the same name

Open = Callable[[str], Any]
ReadAll = Callable[[list[SourceFile]], dict[str, bytes]]  # files → their content, by path
_AT_ONCE = 256  # images whose neighbours are read together,
_AT_ONCE_BYTES = 8 << 20  # and bytes of these


def folder(files: Iterable[list[SourceFile]], source: Source, read: ReadAll) -> Iterator[Row]:
    """Images with NAME.txt or NAME.json beside them; .txt has the caption, .json the caption and other fields. What
    shares a name is in one of the lists."""
    anything = False
    for some in files:
        images = [file for file in some if PurePosixPath(file.path).suffix.lower() in IMAGES]
        anything = anything or bool(images)
        for part in _parts(images, _named(some)):
            yield from _images(part, source, read)
    if not anything:
        kinds = ", ".join(sorted(IMAGES))
        raise RecipeError("source.path", f"no image at {source.path}", f"name a folder with files of {kinds}")


def _named(files: list[SourceFile]) -> dict[str, SourceFile]:
    """What may lie beside an image, by its name with a suffix in small letters; it itself may be in any."""
    found: dict[str, SourceFile] = {}
    for file in files:
        stem, suffix = _split(file.path)
        small = suffix.lower()
        if small in _BESIDE and (small == suffix or stem + small not in found):
            found[stem + small] = file
    return found


_Beside = tuple[SourceFile | None, SourceFile | None]  # an image's NAME.txt and NAME.json, where they are


def _parts(images: list[SourceFile], named: Mapping[str, SourceFile]) -> Iterator[list[tuple[SourceFile, _Beside]]]:
    """Images with what lies beside them, some at a time, bounded in number and bytes."""
    part: list[tuple[SourceFile, _Beside]] = []
    size = 0
    for image in images:
        beside = _beside(image, named)
        more = sum(file.size for file in beside if file)
        if part and (len(part) == _AT_ONCE or size + more > _AT_ONCE_BYTES):
            yield part
            part, size = [], 0
        part.append((image, beside))
        size += more
    if part:
        yield part


def _images(part: list[tuple[SourceFile, _Beside]], source: Source, read: ReadAll) -> Iterator[Row]:
    content = read([file for _, beside in part for file in beside if file])
    for image, beside in part:
        text, said = (content[file.path] if file else None for file in beside)
        record = _json_object(said or b"{}")
        caption = _caption(None if text is None else text.decode("utf-8", "replace").strip(), record, source)
        yield _row(image.path, caption, image.path, 0, image.size, record, source)


def _beside(image: SourceFile, named: Mapping[str, SourceFile]) -> _Beside:
    stem = _split(image.path)[0]
    return named.get(f"{stem}.txt"), named.get(f"{stem}.json")


def webdataset(file: SourceFile, source: Source, open_: Open) -> Iterator[Row]:
    """The samples of a tar: KEY.jpg (or another image) with KEY.txt and KEY.json beside it."""
    with open_(file.path) as stream:
        _refuse_packed(file, stream.read(6))
        apart, seen = _Apart(file.path), set[bytes]()
        try:
            for _, group in itertools.groupby(members(stream), key=lambda member: _first_split(member.name)[0]):
                for sample in _samples(list(group)):
                    yield from _sample(sample, stream, file, source, apart, seen)
        except tarfile.ReadError as error:
            problem = f"{file.path} is not a tar, or is cut ({error})"
            raise RecipeError("source.path", problem, "replace or remove the file") from None


def _refuse_packed(file: SourceFile, magic: bytes) -> None:
    """Images are read by byte range, which a compressed file does not allow."""
    for start, command in _PACKED.items():
        if magic.startswith(start):
            problem = f"{file.path} is compressed, and images in tars are read in place"
            raise RecipeError("source.path", problem, f"unpack it first: {command} {PurePosixPath(file.path).name}")


_PACKED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz"}


def _samples(group: list[Member]) -> list[list[Member]]:
    """Members that share their name up to its first dot → samples: one, as in KEY.jpg, KEY.seg.png, KEY.txt.

    Where no member is named just KEY and an image's suffix, the keys hold dots themselves, and end at the last one.
    Where an image's name comes again, so does its sample.
    """
    if any(_first_split(member.name)[1].lower() in IMAGES for member in group):
        return [group] if len({member.name for member in group}) == len(group) else _parted(group)
    return [list(sample) for _, sample in itertools.groupby(group, key=lambda member: _split(member.name)[0])]


def _parted(group: list[Member]) -> list[list[Member]]:
    """A group in which names are there twice → a new sample begins with each name that the one before has, if a
    image's are among them."""
    images = [member.name for member in group if _split(member.name)[1].lower() in IMAGES]
    if len(set(images)) == len(images):
        return [group]
    samples: list[list[Member]] = [[]]
    for member in group:
        if any(member.name == other.name for other in samples[-1]):
            samples.append([])
        samples[-1].append(member)
    return samples


class _Apart:
    """Looks for captions that do not lie beside their image, as in a tar of a.jpg, b.jpg, a.txt, b.txt: read sample
    by sample, all would be lost. Holds a hash of each name that lacks .txt or .json, and of each of these alone."""

    def __init__(self, tar: str) -> None:
        self._tar = tar
        self._lacking, self._alone = ({suffix: set[bytes]() for suffix in _BESIDE} for _ in range(2))

    def check(self, stem: str, suffixes: set[str], *, image: bool) -> None:
        """Note a sample and which of _BESIDE it has. Raises RecipeError where what it lacks lies elsewhere."""
        noted = _BESIDE - suffixes if image else suffixes
        here, there = (self._lacking, self._alone) if image else (self._alone, self._lacking)
        name = _hash(stem)
        for suffix in noted:
            here[suffix].add(name)
            if name in there[suffix]:
                problem = (
                    f"{stem}{suffix} stands apart from its image in {self._tar}, so that its caption would be lost"
                )
                raise RecipeError("source.path", problem, "unpack the tar, and pack it by name: tar --sort=name -cf …")


def _hash(name: str) -> bytes:
    return blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _sample(
    sample: list[Member], stream: BinaryIO, file: SourceFile, source: Source, apart: _Apart, seen: set[bytes]
) -> Iterator[Row]:
    image, caption, record, beside = None, "", dict[str, Any](), set[str]()
    split = _first_split if any(_first_split(member.name)[1].lower() in IMAGES for member in sample) else _split
    for member in sample:
        suffix = split(member.name)[1].lower()
        if suffix in IMAGES and image is None:
            image = member
        elif suffix in _BESIDE:
            beside.add(suffix)
            stream.seek(member.offset)
            data = stream.read(member.size)
            if suffix == ".json":
                record = _json_object(data)
            else:
                caption = data.decode("utf-8", "replace").strip()
    if image is None or beside != _BESIDE:
        apart.check(split(sample[0].name)[0], beside, image=image is not None)
    if image is None:
        return
    caption = _caption(caption or None, record, source)
    url = text_of(f"{file.path}#{image.name}")
    name = _hash(url)
    if name in seen:  # another image of this name: the first has the key that it would have alone
        url += f"@{image.offset}"
    seen.add(name)
    yield _row(url, caption, file.path, image.offset, image.size, record, source)


def _row(url: str, caption: str, file: str, offset: int, length: int, record: dict[str, Any], source: Source) -> Row:
    hash_ = text_of(record.get(source.hash)).strip() if source.hash else ""
    return Row(url, caption, None, file, offset, length, to_json(record), hash_)


def _caption(text: str | None, record: dict[str, Any], source: Source) -> str:
    """What NAME.txt says, or without one (None) NAME.json, from which it is taken out."""
    if text is None:
        return caption_of(record, source.caption)
    record.pop(source.caption, None)
    return text


def _split(name: str) -> tuple[str, str]:
    """A name up to its last dot, which all files of a sample share, and from there on.

    >>> _split("a/b.c.jpg"), _split("a.b/c")
    (('a/b.c', '.jpg'), ('a.b/c', ''))
    """
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix) if dot and "/" not in suffix else (name, "")


def _first_split(name: str) -> tuple[str, str]:
    """A name up to the first dot of its last part, and from there on.

    >>> _first_split("a.b/c.seg.png")
    ('a.b/c', '.seg.png')
    """
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", dot + suffix


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
