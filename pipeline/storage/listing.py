"""List a disk's files in batches

Links are followed, but for links to texts that lead out of the folder: an image folder from elsewhere must not be able
to make a caption of a file of this machine. Memory holds the names of one folder at a time.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote_from_bytes, unquote_to_bytes

log = logging.getLogger(__name__)

_MOST = 1000  # files in a batch; more if many share a name

_IMAGE_ENDS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A user's file: its path (see `as_text`) or URL, size in bytes, and a stamp that changes when its content does.

    `named`: the user named the file itself, not a folder or glob that contains it. `outside`: it is a text, and a link
    that leads out of the folder that the user named; it must not be read.
    """

    path: str
    size: int
    stamp: str
    named: bool = False
    outside: bool = False


Batches = Iterator[list[SourceFile]]  # files of a folder that share their name (see stem_of) are in one batch


def walk(
    folder: str, depth: int | None = None, _above: frozenset[tuple[int, int]] = frozenset(), _root: str = ""
) -> Batches:
    """Yield the files in `folder` and its subfolders down to `depth` (1: this folder only; None: any depth).

    Not entered, but logged: links to a folder above them; if all depths are read, links to a folder that is read
    anyway; and folders without read permission.
    """
    _root = _root or os.path.realpath(folder)
    names, folders, links = list[str](), list[str](), set[str]()
    try:
        info = Path(folder).stat()
        if (info.st_dev, info.st_ino) in _above:
            log.warning("source: %s links to a folder above it and is not entered", folder)
            return
        if depth is None and _above and Path(folder).is_symlink() and _lies_in(os.path.realpath(folder), _root):
            log.warning("source: %s links to a folder that is read anyway and is not entered", folder)
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_macos_file(entry.name):
                    continue
                (folders if _is_folder(entry) else names).append(entry.name)
                if entry.is_symlink():
                    links.add(entry.name)
    except OSError as error:
        log.warning("source: skipped %s (%s)", folder, error.strerror or error)
        return
    base = folder.rstrip("/")
    names.sort()
    names.sort(key=stem_of)
    for batch in _cut(names, stem_of):
        files = [(name, file_at(f"{base}/{name}")) for name in batch]
        yield [
            replace(file, outside=True) if name in links and _is_text_outside(f"{base}/{name}", _root) else file
            for name, file in files
            if file
        ]
    if depth != 1:
        for name in sorted(folders):
            yield from walk(f"{base}/{name}", depth and depth - 1, _above | {(info.st_dev, info.st_ino)}, _root)


def matching(pattern: re.Pattern[str], folder: str, depth: int | None) -> Batches:
    """Yield the files in `folder`, down to `depth`, whose whole path `pattern` matches."""
    for batch in walk(folder, depth) if Path(folder).is_dir() else ():
        if matches := [file for file in batch if pattern.match(on_disk(file.path) or "")]:
            yield matches


def file_at(path: str, *, named: bool = False) -> SourceFile | None:
    """Return the file at `path`; None if it is not a file. A broken link counts as a file: reading it will fail."""
    try:
        info = os.stat(path)  # noqa: PTH116 - called for every file: a Path takes longer than the disk
    except OSError:
        return SourceFile(as_text(path), 0, "", named) if Path(path).is_symlink() else None
    return SourceFile(as_text(path), info.st_size, str(info.st_mtime), named) if stat.S_ISREG(info.st_mode) else None


def is_macos_file(name: str) -> bool:
    """Return whether macOS made this file for itself: ._NAME, and everything in __MACOSX.

    >>> is_macos_file("a/._b.jpg"), is_macos_file("__MACOSX/a/b.jpg"), is_macos_file("a/b.jpg")
    (True, True, False)
    """
    *folders, last = name.split("/")
    return last.startswith("._") or "__MACOSX" in folders


def as_text(path: str) -> str:
    """Return `path`; if it is not UTF-8, a URL with percent-encoded bytes (RFC 8089), which tables and JSON can hold.

    >>> as_text("/caf\\udce9 1.jpg"), as_text("/café 1.jpg")
    ('file:///caf%E9%201.jpg', '/café 1.jpg')
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"file://{quote_from_bytes(os.fsencode(path))}"
    return path


def on_disk(path: str) -> str | None:
    """Return the path of a SourceFile: the inverse of `as_text`; None if it is not on this machine."""
    if path.startswith("file://"):
        return os.fsdecode(unquote_to_bytes(path.removeprefix("file://")))
    return None if "://" in path else path


def _lies_in(path: str, root: str) -> bool:
    return path.startswith(f"{root.rstrip('/')}/")


def _is_text_outside(link: str, root: str) -> bool:
    """Return whether a link may be to a text, and leads out of the folder `root`.

    Images, tars and Parquet files elsewhere are no texts: what is none of these cannot be read as one. The files of a
    snapshot in Hugging Face's cache are links to the blobs next to it: DATASET/snapshots/REVISION/x → DATASET/blobs/y.
    """
    if link.lower().endswith((*_IMAGE_ENDS, ".tar", ".parquet", ".arrow")):
        return False
    target = os.path.realpath(link)
    return not any(_lies_in(target, folder) for folder in (root, *_blobs(root)))


def _blobs(root: str) -> list[str]:
    """Return the folder of blobs of the repository in Hugging Face's cache that `root` is part of, if it is."""
    for folder in Path(f"{root}/x").parents:
        repository = folder.parent
        if folder.name == "snapshots" and repository.name.startswith(("datasets--", "models--", "spaces--")):
            return [str(repository / "blobs")]
    return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def in_batches(files: Iterable[SourceFile]) -> Batches:
    """Yield files of any folders in batches like those of `walk`."""
    return _cut(sorted(files, key=lambda file: (stem_of(file.path), file.path)), lambda file: stem_of(file.path))


def _cut(items: list[T], stem: Callable[[T], str]) -> Iterator[list[T]]:
    """Yield lists of about _MOST sorted items; items of one stem are never separated."""
    batch: list[T] = []
    for _, same in itertools.groupby(items, key=stem):
        batch += same
        if len(batch) >= _MOST:
            yield batch
            batch = []
    if batch:
        yield batch


def stem_of(name: str) -> str:
    """Return a name up to its last dot, or up to the last but one in NAME.jpg.txt: what an image and its texts share.

    >>> stem_of("a.b/c.d.jpg"), stem_of("a.b/c"), stem_of("a/b.jpg.txt")
    ('a.b/c.d', 'a.b/c', 'a/b')
    """
    stem = _stem(name)
    return _stem(stem) if stem[-5:].lower().endswith(_IMAGE_ENDS) else stem


def _stem(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and "/" not in suffix else name
