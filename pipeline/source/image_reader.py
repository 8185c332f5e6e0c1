"""Where images lie in the source's files → their bytes, or why they cannot be read. In the order of the files.

The rows of a unit are sorted by key, so they lie at random over all files. Read in the order of (file, offset) each
file is opened once. The disk is told what comes next, so that it works while images are decoded; from a bucket many
ranges are asked for at once, the next ones while those before are decoded.

A source may change after it was planned. A whole file on a disk is read as it is now. Of a file in a tar the header
that lies before it is read along, and must still be its own.
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

_AHEAD: Final = 32  # images that the disk is told of in advance
_BATCH: Final = 128  # ranges asked for at once,
_BATCH_BYTES: Final = 16 << 20  # and bytes of them


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """`length` bytes at `offset` of `file`, a path or URL: the image of row `index`. At 0 lies a whole file; `member`
    is the name of one in a tar ("": not asked for)."""

    file: str
    offset: int
    length: int
    index: int
    member: str = ""

    @property
    def start(self) -> int:
        """Where reading begins: before the headers that tell whose bytes they are."""
        blocks = (1 if fits(self.member) else 2) if self.member else 0
        return max(0, self.offset - blocks * BLOCK)

    @property
    def stop(self) -> int:
        return self.offset + self.length


Found = tuple[int, bytes | Exception]


class TooLarge(OSError):
    """A file has grown beyond what may be read."""


def span_of(row: Mapping[str, Any], index: int) -> Span:
    """Where the image of a planned row (records.PLAN_SCHEMA) with a `file` lies."""
    in_tar = row["url"].startswith(f"{row['file']}#") and row["offset"]
    member = row["url"][len(row["file"]) + 1 :] if in_tar else ""
    return Span(row["file"], row["offset"], row["length"], index, member)


def read_images(spans: Iterable[Span], recipe: Recipe, *, most: int | None = None) -> Iterator[Found]:
    """(index, bytes or what went wrong) for every span; TooLarge for a whole file that now has more than `most` bytes
    (None: any number)."""
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
                yield _take(ahead, most)
        while ahead:
            yield _take(ahead, most)
    finally:
        for left in {handle for _, handle in ahead if isinstance(handle, int)}:
            os.close(left)


def _open(file: str) -> int | OSError:
    try:
        return os.open(on_disk(file) or file, os.O_RDONLY)
    except OSError as error:
        return error


def _take(ahead: deque[tuple[Span, int | OSError]], most: int | None) -> Found:
    """Read the first span; close its file where the next one lies in another."""
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
        asked: deque[Any] = deque()
        for batch in _batches(spans):
            asked.append((batch, background.submit(_ask, batch, recipe)))
            if len(asked) > 1:
                yield from _answers(*asked.popleft())
        while asked:
            yield from _answers(*asked.popleft())


def _batches(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Of the same kind of storage each, and bounded."""
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


def _ask(batch: list[Span], recipe: Recipe) -> list[bytes | Exception]:
    ranges = [(span.file, span.start, span.stop) for span in batch]
    return read_ranges(ranges, options_of(batch[0].file, recipe))


def _answers(batch: list[Span], answer: Any) -> Iterator[Found]:
    for span, found in zip(batch, answer.result(), strict=True):
        yield span.index, _checked(found, span) if isinstance(found, bytes) else found


def _checked(data: bytes, span: Span) -> bytes | Exception:
    """The image in `data`, the bytes [start, stop), if they are still those that were planned."""
    if len(data) != span.stop - span.start:
        missing = f"{len(data)} of {span.stop - span.start} bytes at {span.start}"
        return OSError(f"{span.file} has changed since it was planned: {missing}")
    before, image = data[: span.offset - span.start], data[span.offset - span.start :]
    names = {span.member, span.member.removesuffix(f"@{span.offset}")}  # the latter of one whose name is there twice
    if before and not any(is_of(before, name, span.length) for name in names):
        return OSError(f"{span.file} has changed since it was planned: {span.member} is not at {span.offset} any more")
    return image


def options_of(path: str, recipe: Recipe) -> dict[str, Any]:
    """fsspec options for a file of the source: its own, or the dataset's where that is on the same kind of storage."""
    if recipe.source is not None and recipe.source.storage is not None:
        return dict(recipe.source.storage)
    protocol = recipe.dataset.partition("://")[0] if "://" in recipe.dataset else ""
    return dict(recipe.storage) if protocol and path.startswith(f"{protocol}://") else {}
