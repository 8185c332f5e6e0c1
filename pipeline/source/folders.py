"""Image folders and WebDataset tars → rows

The images stay where they are; a row holds the position of their bytes.
"""

from __future__ import annotations

import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Final

import pyarrow as pa

from capstan.pipeline.config import Source
from capstan.pipeline.dataset.own_shards import FACTS, Own, score_columns
from capstan.pipeline.dataset.parts import part_names
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.records import PLAN_SCHEMA
from capstan.pipeline.source.bounds import MOST_TEXT, OVERSIZED, too_long
from capstan.pipeline.source.carried import carried_fields, is_carried
from capstan.pipeline.source.columns import (
    NO_TEXT,
    Row,
    as_objects,
    caption_of,
    is_nested,
    make_keys,
    text_in_file,
    text_of,
    to_json,
)
from capstan.pipeline.source.image_metadata import Described, ImageMetadata, is_metadata
from capstan.pipeline.source.samples import (
    IMAGES,
    JSON,
    TAR_IMAGES,
    TEXTS,
    Suffixes,
    TarSample,
    first_split,
    parts_of,
    samples_of,
    split,
    unused_suffix,
)
from capstan.pipeline.source.tar_index import Member, members
from capstan.pipeline.storage.listing import SourceFile, is_macos_file

_SIDECARS = frozenset([".txt", ".json"])  # a caption and other fields: what describes an image, under any suffix

Open = Callable[[str], Any]
ReadAll = Callable[[list[SourceFile]], dict[str, bytes]]  # files → their content, by path
Unused = Counter[str]  # suffix → files or members of no use
_BATCH_IMAGES = 256  # images whose sidecars are read together,
_BATCH_BYTES = 8 << 20  # and bytes of these sidecars


def folder(
    files: Iterable[list[SourceFile]],
    source: Source,
    read: ReadAll,
    metadata: ImageMetadata | None,
    unused: Unused,
    suffixes: Suffixes = IMAGES,
) -> Iterator[Row]:
    """Yield a row for each image.

    NAME.txt (or .caption, .cap, .text; or NAME.jpg.txt) holds its caption; NAME.json the caption and other fields; so
    does its row in `metadata`. Files that share a name must be in the same batch of `files`. The suffixes of files that
    are not used are counted in `unused`. `suffixes` are those of the files that the rows are of. Raises RecipeError if
    there is none.
    """
    anything = False
    for batch in files:
        images = [file for file in batch if PurePosixPath(file.path).suffix.lower() in suffixes]
        anything = anything or bool(images)
        left = {file.path for file in batch if not is_metadata(file)} - {file.path for file in images}
        for part in _parts(images, _named(batch)):
            left -= {file.path for _, sidecars in part for file in sidecars if file}
            yield from _images(part, source, read, metadata)
        unused.update(split(path)[1].lower() or PurePosixPath(path).name for path in left)
    if not anything:
        kinds, what = ", ".join(sorted(suffixes)), "image" if suffixes == IMAGES else "video or sound"
        raise RecipeError("source.path", f"no {what} at {source.path}", f"name a folder that contains {kinds} files")


def _named(files: list[SourceFile]) -> dict[str, SourceFile]:
    """Return the sidecars by their names with a lower-case suffix; in the folder it may have any case."""
    found: dict[str, SourceFile] = {}
    for file in files:
        stem, suffix = split(file.path)
        small = suffix.lower()
        if small in (*TEXTS, JSON) and (small == suffix or stem + small not in found):
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


def _images(
    part: list[tuple[SourceFile, _Sidecars]], source: Source, read: ReadAll, metadata: ImageMetadata | None
) -> Iterator[Row]:
    content = read([file for _, sidecars in part for file in sidecars if file and file.size <= MOST_TEXT])
    for image, sidecars in part:
        text, fields = (content.get(file.path) if file else None for file in sidecars)
        record = _record(fields, *(file.size if file else 0 for file in sidecars))
        described = metadata.of(image.path) if metadata else None
        caption = _caption(text, described, record, source)
        yield _row(image.path, caption, image.path, 0, image.size, record, source)


def _sidecars(image: SourceFile, named: Mapping[str, SourceFile]) -> _Sidecars:
    stems = (split(image.path)[0], image.path)  # NAME.txt; NAME.jpg.txt

    def first(suffixes: Iterable[str]) -> SourceFile | None:
        names = (stem + suffix for stem in stems for suffix in suffixes)
        return next((named[name] for name in names if name in named), None)

    return first(TEXTS), first([JSON])


def webdataset(
    file: SourceFile,
    source: Source,
    open_: Open,
    unused: Unused,
    own: Mapping[int, Own] | None = None,
    suffixes: Suffixes = TAR_IMAGES,
) -> Iterator[Row]:
    """Yield a row for each sample of a tar (see samples.py). Suffixes of members that are not used go to `unused`.

    `own` holds what is known of the images of one of Capstan's shards, by their offsets. `suffixes` are those of the
    files that the rows are of.

    Raises RecipeError for a file that is compressed, is not a tar, is cut, or has samples that are links.
    """
    with open_(file.path) as stream:
        _refuse_packed(file, stream.read(6))
        detached, seen = _Detached(file.path), set[bytes]()
        try:
            for _, group in itertools.groupby(
                _members(stream, file, suffixes), key=lambda member: first_split(member.name)[0]
            ):
                for sample in samples_of(list(group), suffixes):
                    parts = parts_of(sample, source.parts or [])
                    unused.update(unused_suffix(member.name) for member in sample.left_over)
                    yield from _sample(sample, stream, file, source, detached, seen, own or {}, parts)
        except tarfile.ReadError as error:
            problem = f"{file.path} is not a tar, or is cut ({error})"
            raise RecipeError("source.path", problem, "replace or remove the file") from None


def is_read_by_table(table: pa.Table, source: Source) -> bool:
    """Return whether the table of one of Capstan's shards says all that the recipe's `source` asks of its tar."""
    plain = source.hash is None and not source.parts and source.caption == "caption"
    return plain and not part_names(table.column_names) and not any(map(is_nested, table.schema.types))


def by_table(file: SourceFile, table: pa.Table, source: Source) -> pa.Table:
    """Return the rows of one of Capstan's shards (PLAN_SCHEMA), as `webdataset` yields them, by the table next to it.

    No member of the tar is read: KEY.json and KEY.txt repeat what the table says.
    """
    count = len(table)
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    carried = {name: columns[name] for name in (*_IN_JSON, *score_columns(table)) if is_carried(name, source)}
    if "phash" in carried:
        carried["phash"] = pa.array([f"{value:016x}" for value in columns["phash"].to_pylist()], pa.string())
    names = [text_of(f"{file.path}#{key}.jpg") for key in columns["key"].to_pylist()]
    url = pa.array(names, pa.string())
    made = {
        "key": make_keys(pa.repeat("file", count), url),
        "url": url,
        "caption": [text.removeprefix("\ufeff").strip() or text for text in columns["caption"].to_pylist()],
        "image": pa.nulls(count, pa.binary()),
        "file": pa.repeat(text_of(file.path), count),
        "offset": columns["offset"],
        "length": columns["size"],
        "extra": as_objects(carried, count),
        "hash": pa.repeat("", count),
        "facts": as_objects({name: columns[name] for name in FACTS}, count),
        "parts": pa.repeat("", count),
    }
    return pa.table({name: made[name] for name in PLAN_SCHEMA.names}, schema=PLAN_SCHEMA)


# The fields of KEY.json in a shard, without the caption.
_IN_JSON: Final = ("key", "url", "width", "height", "original_width", "original_height", "sha256", "phash", "extra")


def _members(stream: BinaryIO, file: SourceFile, suffixes: Suffixes) -> Iterator[Member]:
    """Yield the members of a tar that may belong to samples. Raises RecipeError for one that is a link."""
    for member in members(stream):
        if is_macos_file(member.name):
            continue
        if member.link and split(member.name)[1].lower() in (*suffixes, *TEXTS, JSON):
            problem = f"{member.name} in {file.path} is a link to {member.link[:200]}; links in tars are not followed"
            hint = "unpack the tar, then pack it without links: tar --dereference --hard-dereference --sort=name -cf …"
            raise RecipeError("source.path", problem, hint)
        if not member.link:
            yield member


def _refuse_packed(file: SourceFile, magic: bytes) -> None:
    """Raise RecipeError for a compressed tar: images are read by byte range, which compression does not allow."""
    for start, command in _PACKED.items():
        if magic.startswith(start):
            problem = f"{file.path} is compressed, and images in tars are read in place"
            raise RecipeError("source.path", problem, f"unpack it first: {command} {PurePosixPath(file.path).name}")


_PACKED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz"}


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
    sample: TarSample,
    stream: BinaryIO,
    file: SourceFile,
    source: Source,
    detached: _Detached,
    seen: set[bytes],
    own: Mapping[int, Own],
    parts: str,
) -> Iterator[Row]:
    present = {".txt": sample.text, ".json": sample.record}
    sidecars = {suffix for suffix, member in present.items() if member is not None}
    if sample.image is None or sidecars != _SIDECARS:
        detached.check(sample.stem, sidecars, image=sample.image is not None)
    if sample.image is None:
        return
    text, fields = (_content(member, stream) for member in (sample.text, sample.record))
    record = _record(fields, *(member.size if member else 0 for member in (sample.text, sample.record)))
    caption = _caption(text, None, record, source)
    url = text_of(f"{file.path}#{sample.image.name}")
    name = _hash(url)
    if name in seen:  # the first image of a name keeps the key that it would have alone
        url += f"@{sample.image.offset}"
    seen.add(name)
    facts, scores = own.get(sample.image.offset, ("", {}))
    row = _row(url, caption, file.path, sample.image.offset, sample.image.size, record | scores, source)
    yield replace(row, facts=facts, parts=parts)


def _content(member: Member | None, stream: BinaryIO) -> bytes | None:
    if member is None or member.size > MOST_TEXT:
        return None
    stream.seek(member.offset)
    return stream.read(member.size)


def _row(url: str, caption: str, file: str, offset: int, length: int, record: dict[str, Any], source: Source) -> Row:
    hash_ = text_of(record.get(source.hash)).strip() if source.hash else ""
    return Row(url, caption, None, file, offset, length, to_json(carried_fields(record, source)), hash_)


def _caption(text: bytes | None, described: Described | None, record: dict[str, Any], source: Source) -> str:
    """Return the caption: a text file's, else that of the folder's metadata, else that of NAME.json.

    It is removed from `record`, into which the other fields of the metadata go.
    """
    if NO_TEXT in record:  # the file is too long
        return ""
    own = caption_of(record, source.caption)
    caption = text_in_file(text or b"").strip()
    if described is not None:
        record.update(described.fields)
        own = described.caption
    if caption:
        record.pop(NO_TEXT, None)
    return caption or own


def _record(fields: bytes | None, text_size: int, fields_size: int) -> dict[str, Any]:
    """Return the fields of NAME.json, and what the sizes of NAME.txt and NAME.json (bytes) say of those not read."""
    record = _json_object(fields or b"{}")
    if text_size > MOST_TEXT:
        record[NO_TEXT] = too_long(text_size)
    if fields_size > MOST_TEXT:
        record[OVERSIZED] = fields_size
    return record


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
