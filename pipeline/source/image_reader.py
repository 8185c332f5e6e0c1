"""Positions of images in the source's files → their bytes, or an error

The rows of a unit are sorted by key, so they are spread at random over all files. They are read in the order of (file,
offset), so that each file is opened once. The operating system learns which bytes come next, so that the disk works
while images are decoded; from a bucket many ranges are requested at once, the next ones while the previous are decoded.

A source may change after it was planned. A whole file on a disk is read as it is now. For a file in a tar the header
before it is read as well, and must still match.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from capstan.pipeline.config import Recipe
from capstan.pipeline.source.tar_index import BLOCK, fits, is_of
from capstan.pipeline.storage import read_ranges
from capstan.pipeline.storage.listing import on_disk

_AHEAD: Final = 32  # images announced to the operating system in advance
_BATCH: Final = 128  # ranges requested at once,
_BATCH_BYTES: Final = 16 << 20  # and bytes of them


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """`length` bytes at `offset` of `file`, a path or URL: the image of row `index`.

    Offset 0 means a whole file. `member` is the name of a file in a tar ("": not checked).
    """

    file: str
    offset: int
    length: int
    index: int
    member: str = ""

    @property
    def start(self) -> int:
        """The offset where reading starts: before the headers that name the file."""
        blocks = (1 if fits(self.member) else 2) if self.member else 0
        return max(0, self.offset - blocks * BLOCK)

    @property
    def stop(self) -> int:
        return self.offset + self.length


Found = tuple[int, bytes | Exception]


class TooLarge(OSError):
    """A file is larger than may be read."""


def span_of(row: Mapping[str, Any], index: int) -> Span:
    """Return the position of the image of a planned row (records.PLAN_SCHEMA) that has a `file`."""
    in_tar = row["url"].startswith(f"{row['file']}#") and row["offset"]
    member = row["url"][len(row["file"]) + 1 :] if in_tar else ""
    return Span(row["file"], row["offset"], row["length"], index, member)


def read_images(spans: Iterable[Span], recipe: Recipe, *, most: int | None = None) -> Iterator[Found]:
    """Yield (index, bytes or error) for every span.

    The error is TooLarge for a whole file that now has more than `most` bytes (None: no limit).
    """
    in_order = sorted(spans)
    yield from _local([span for span in in_order if on_disk(span.file)], most)
    remote = [span for span in in_order if not on_disk(span.file)]
    yield from ((span.index, b"") for span in remote if not span.length)  # no range of a file is empty in HTTP
    yield from _remote([span for span in remote if span.length], recipe)


def _local(spans: Iterable[Span], most: int | None) -> Iterator[Found]:
    ahead: deque[tuple[Span, int | OSError]] = deque()
    file = ""
    handle: int | OSError = OSError("no file yet")
    try:
        for span in spans:
            if span.file != file:
                file, handle = span.file, _open(span.file)
            wanted = span.offset or most is None or span.length <= most
            if isinstance(handle, int) and wanted and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, span.start, span.stop - span.start, os.POSIX_FADV_WILLNEED)
            ahead.append((span, handle))
            if len(ahead) > _AHEAD:
                yield _read_next(ahead, most)
        while ahead:
            yield _read_next(ahead, most)
    finally:
        for left in {handle for _, handle in ahead if isinstance(handle, int)}:
            os.close(left)


def _open(file: str) -> int | OSError:
    try:
        return os.open(on_disk(file) or file, os.O_RDONLY)
    except OSError as error:
        return error


def _read_next(ahead: deque[tuple[Span, int | OSError]], most: int | None) -> Found:
    """Read the first span; close its file if the next one is in another."""
    span, handle = ahead.popleft()
    if isinstance(handle, OSError):
        return span.index, handle
    try:
        if span.offset:
            return span.index, _checked(os.pread(handle, span.stop - span.start, span.start), span)
        size = os.fstat(handle).st_size
        if most is not None and size > most:
            return span.index, TooLarge(f"{size} bytes")
        return span.index, os.pread(handle, size, 0)
    except OSError as error:
        return span.index, error
    finally:
        if not ahead or ahead[0][1] != handle:
            os.close(handle)


def _remote(spans: Iterable[Span], recipe: Recipe) -> Iterator[Found]:
    with ThreadPoolExecutor(1) as background:
        requested: deque[Any] = deque()
        for batch in _batches(spans):
            requested.append((batch, background.submit(_request, batch, recipe)))
            if len(requested) > 1:
                yield from _results(*requested.popleft())
        while requested:
            yield from _results(*requested.popleft())


def _batches(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Yield bounded lists of spans, each on one kind of storage."""
    batch: list[Span] = []
    size = 0
    for span in spans:
        full = len(batch) == _BATCH or size + span.length > _BATCH_BYTES
        if batch and (full or _protocol(span) != _protocol(batch[0])):
            yield batch
            batch, size = [], 0
        batch.append(span)
        size += span.length
    if batch:
        yield batch


def _protocol(span: Span) -> str:
    return span.file.partition("://")[0]


def _request(batch: list[Span], recipe: Recipe) -> list[bytes | Exception]:
    ranges = [(span.file, span.start, span.stop) for span in batch]
    return read_ranges(ranges, options_of(batch[0].file, recipe))


def _results(batch: list[Span], future: Any) -> Iterator[Found]:
    for span, found in zip(batch, future.result(), strict=True):
        yield span.index, _checked(found, span) if isinstance(found, bytes) else found


def _checked(data: bytes, span: Span) -> bytes | Exception:
    """Return the image in `data`, the bytes [start, stop), or an error if they are not those that were planned."""
    if len(data) != span.stop - span.start:
        missing = f"{len(data)} of {span.stop - span.start} bytes at {span.start}"
        return OSError(f"{span.file} has changed since it was planned: {missing}")
    before, image = data[: span.offset - span.start], data[span.offset - span.start :]
    names = {span.member, span.member.removesuffix(f"@{span.offset}")}  # the latter if its name is repeated in the tar
    if before and not any(is_of(before, name, span.length) for name in names):
        return OSError(f"{span.file} has changed since it was planned: {span.member} is not at {span.offset} anymore")
    return image


def options_of(path: str, recipe: Recipe) -> dict[str, Any]:
    """Return fsspec options for a file of the source: its own, or the dataset's if both are on one kind of storage."""
    if recipe.source is not None and recipe.source.storage is not None:
        return dict(recipe.source.storage)
    protocol = recipe.dataset.partition("://")[0] if "://" in recipe.dataset else ""
    return dict(recipe.storage) if protocol and path.startswith(f"{protocol}://") else {}
