"""Image folders and WebDataset tars → rows

The images stay where they are; a row holds the position of their bytes.
"""

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
_SIDECARS = frozenset([".txt", ".json"])  # files that describe the image of the same name

Open = Callable[[str], Any]
ReadAll = Callable[[list[SourceFile]], dict[str, bytes]]  # files → their content, by path
_BATCH_IMAGES = 256  # images whose sidecars are read together,
_BATCH_BYTES = 8 << 20  # and bytes of these sidecars


def folder(files: Iterable[list[SourceFile]], source: Source, read: ReadAll) -> Iterator[Row]:
    """Yield a row for each image. NAME.txt holds its caption; NAME.json the caption and other fields.

    Files that share a name must be in the same batch of `files`. Raises RecipeError if there is no image.
    """
    anything = False
    for batch in files:
        images = [file for file in batch if PurePosixPath(file.path).suffix.lower() in IMAGES]
        anything = anything or bool(images)
        for part in _parts(images, _named(batch)):
            yield from _images(part, source, read)
    if not anything:
        kinds = ", ".join(sorted(IMAGES))
        raise RecipeError("source.path", f"no image at {source.path}", f"name a folder that contains {kinds} files")


def _named(files: list[SourceFile]) -> dict[str, SourceFile]:
    """Return the sidecars by their names with a lower-case suffix; in the folder it may have any case."""
    found: dict[str, SourceFile] = {}
    for file in files:
        stem, suffix = _split(file.path)
        small = suffix.lower()
        if small in _SIDECARS and (small == suffix or stem + small not in found):
            found[stem + small] = file
    return found


_Sidecars = tuple[SourceFile | None, SourceFile | None]  # an image's NAME.txt and NAME.json, if there are any


def _parts(images: list[SourceFile], named: Mapping[str, SourceFile]) -> Iterator[list[tuple[SourceFile, _Sidecars]]]:
    """Yield lists of images with their sidecars, bounded in number and bytes."""
    part: list[tuple[SourceFile, _Sidecars]] = []
    size = 0
    for image in images:
        sidecars = _sidecars(image, named)
        more = sum(file.size for file in sidecars if file)
        if part and (len(part) == _BATCH_IMAGES or size + more > _BATCH_BYTES):
            yield part
            part, size = [], 0
        part.append((image, sidecars))
        size += more
    if part:
        yield part


def _images(part: list[tuple[SourceFile, _Sidecars]], source: Source, read: ReadAll) -> Iterator[Row]:
    content = read([file for _, sidecars in part for file in sidecars if file])
    for image, sidecars in part:
        text, fields = (content[file.path] if file else None for file in sidecars)
        record = _json_object(fields or b"{}")
        caption = _caption(None if text is None else text.decode("utf-8", "replace").strip(), record, source)
        yield _row(image.path, caption, image.path, 0, image.size, record, source)


def _sidecars(image: SourceFile, named: Mapping[str, SourceFile]) -> _Sidecars:
    stem = _split(image.path)[0]
    return named.get(f"{stem}.txt"), named.get(f"{stem}.json")


def webdataset(file: SourceFile, source: Source, open_: Open) -> Iterator[Row]:
    """Yield a row for each sample of a tar: KEY.jpg (or another image) with KEY.txt and KEY.json.

    Raises RecipeError for a file that is compressed, is not a tar, or is cut.
    """
    with open_(file.path) as stream:
        _refuse_packed(file, stream.read(6))
        detached, seen = _Detached(file.path), set[bytes]()
        try:
            for _, group in itertools.groupby(members(stream), key=lambda member: _first_split(member.name)[0]):
                for sample in _samples(list(group)):
                    yield from _sample(sample, stream, file, source, detached, seen)
        except tarfile.ReadError as error:
            problem = f"{file.path} is not a tar, or is cut ({error})"
            raise RecipeError("source.path", problem, "replace or remove the file") from None


def _refuse_packed(file: SourceFile, magic: bytes) -> None:
    """Raise RecipeError for a compressed tar: images are read by byte range, which compression does not allow."""
    for start, command in _PACKED.items():
        if magic.startswith(start):
            problem = f"{file.path} is compressed, and images in tars are read in place"
            raise RecipeError("source.path", problem, f"unpack it first: {command} {PurePosixPath(file.path).name}")


_PACKED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz"}


def _samples(group: list[Member]) -> list[list[Member]]:
    """Split members that share their name up to its first dot into samples.

    Usually they are one sample, as in KEY.jpg, KEY.seg.png, KEY.txt. If no member is named just KEY and an image's
    suffix, the keys contain dots and end at the last one. If an image's name is repeated, its sample is too.
    """
    if any(_first_split(member.name)[1].lower() in IMAGES for member in group):
        return [group] if len({member.name for member in group}) == len(group) else _parted(group)
    return [list(sample) for _, sample in itertools.groupby(group, key=lambda member: _split(member.name)[0])]


def _parted(group: list[Member]) -> list[list[Member]]:
    """Split a group in which names are repeated: a sample ends where one of its names would come again.

    If only names of files other than images are repeated, the group is one sample.
    """
    images = [member.name for member in group if _split(member.name)[1].lower() in IMAGES]
    if len(set(images)) == len(images):
        return [group]
    samples: list[list[Member]] = [[]]
    for member in group:
        if any(member.name == other.name for other in samples[-1]):
            samples.append([])
        samples[-1].append(member)
    return samples


class _Detached:
    """Detects captions that are not adjacent to their image, as in a tar of a.jpg, b.jpg, a.txt, b.txt.

    Read sample by sample, all of them would be lost. Holds a hash of each image's name that lacks .txt or .json, and of
    each .txt or .json that has no image.
    """

    def __init__(self, tar: str) -> None:
        self._tar = tar
        self._lacking, self._alone = ({suffix: set[bytes]() for suffix in _SIDECARS} for _ in range(2))

    def check(self, stem: str, suffixes: set[str], *, image: bool) -> None:
        """Record which sidecars a sample has. Raises RecipeError if one that it lacks is elsewhere in the tar."""
        noted = _SIDECARS - suffixes if image else suffixes
        here, there = (self._lacking, self._alone) if image else (self._alone, self._lacking)
        name = _hash(stem)
        for suffix in noted:
            here[suffix].add(name)
            if name in there[suffix]:
                problem = f"{stem}{suffix} is not next to its image in {self._tar}, so its caption would be lost"
                hint = "unpack the tar, then pack it sorted by name: tar --sort=name -cf …"
                raise RecipeError("source.path", problem, hint)


def _hash(name: str) -> bytes:
    return blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _sample(
    sample: list[Member], stream: BinaryIO, file: SourceFile, source: Source, detached: _Detached, seen: set[bytes]
) -> Iterator[Row]:
    image, caption, record, sidecars = None, "", dict[str, Any](), set[str]()
    split = _first_split if any(_first_split(member.name)[1].lower() in IMAGES for member in sample) else _split
    for member in sample:
        suffix = split(member.name)[1].lower()
        if suffix in IMAGES and image is None:
            image = member
        elif suffix in _SIDECARS:
            sidecars.add(suffix)
            stream.seek(member.offset)
            data = stream.read(member.size)
            if suffix == ".json":
                record = _json_object(data)
            else:
                caption = data.decode("utf-8", "replace").strip()
    if image is None or sidecars != _SIDECARS:
        detached.check(split(sample[0].name)[0], sidecars, image=image is not None)
    if image is None:
        return
    caption = _caption(caption or None, record, source)
    url = text_of(f"{file.path}#{image.name}")
    name = _hash(url)
    if name in seen:  # the first image of a name keeps the key that it would have alone
        url += f"@{image.offset}"
    seen.add(name)
    yield _row(url, caption, file.path, image.offset, image.size, record, source)


def _row(url: str, caption: str, file: str, offset: int, length: int, record: dict[str, Any], source: Source) -> Row:
    hash_ = text_of(record.get(source.hash)).strip() if source.hash else ""
    return Row(url, caption, None, file, offset, length, to_json(record), hash_)


def _caption(text: str | None, record: dict[str, Any], source: Source) -> str:
    """Return the text of NAME.txt or, if there is none (None), the caption in NAME.json; remove it from the latter."""
    if text is None:
        return caption_of(record, source.caption)
    record.pop(source.caption, None)
    return text


def _split(name: str) -> tuple[str, str]:
    """Split a name at its last dot: the part that all files of a sample share, and the suffix.

    >>> _split("a/b.c.jpg"), _split("a.b/c")
    (('a/b.c', '.jpg'), ('a.b/c', ''))
    """
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix) if dot and "/" not in suffix else (name, "")


def _first_split(name: str) -> tuple[str, str]:
    """Split a name at the first dot of its last part.

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
