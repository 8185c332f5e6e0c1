"""Where pictures lie in the source's files → their bytes, or why they cannot be read. In the order of the files.

The rows of a unit are sorted by key, so they lie at random over all files. Read in the order of (file, offset) each
file is opened once. The disk is told what comes next, so that it works while pictures are decoded; from a bucket many
ranges are asked for at once, the next ones while those before are decoded.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from pipeline.config import Recipe
from pipeline.storage import read_ranges

_AHEAD: Final = 32  # pictures that the disk is told of in advance
_BATCH: Final = 128  # ranges asked for at once,
_BATCH_BYTES: Final = 16 << 20  # and bytes of them


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """`length` bytes at `offset` of `file`, a path or URL: the picture of row `index`."""

    file: str
    offset: int
    length: int
    index: int


Found = tuple[int, bytes | Exception]


def read_pictures(spans: Iterable[Span], recipe: Recipe) -> Iterator[Found]:
    """(index, bytes or what went wrong) for every span."""
    in_order = sorted(spans)
    yield from _local([span for span in in_order if "://" not in span.file])
    remote = [span for span in in_order if "://" in span.file]
    yield from ((span.index, b"") for span in remote if not span.length)  # no range of a file is empty in HTTP
    yield from _remote([span for span in remote if span.length], recipe)


def _local(spans: Iterable[Span]) -> Iterator[Found]:
    ahead: deque[tuple[Span, int | OSError]] = deque()
    file = ""
    handle: int | OSError = OSError("no file yet")
    try:
        for span in spans:
            if span.file != file:
                file, handle = span.file, _open(span.file)
            if isinstance(handle, int) and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, span.offset, span.length, os.POSIX_FADV_WILLNEED)
            ahead.append((span, handle))
            if len(ahead) > _AHEAD:
                yield _take(ahead)
        while ahead:
            yield _take(ahead)
    finally:
        for left in {handle for _, handle in ahead if isinstance(handle, int)}:
            os.close(left)


def _open(file: str) -> int | OSError:
    try:
        return os.open(file, os.O_RDONLY)
    except OSError as error:
        return error


def _take(ahead: deque[tuple[Span, int | OSError]]) -> Found:
    """Read the first span; close its file where the next one lies in another."""
    span, handle = ahead.popleft()
    if isinstance(handle, OSError):
        return span.index, handle
    try:
        return span.index, _whole(os.pread(handle, span.length, span.offset), span)
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
    ranges = [(span.file, span.offset, span.offset + span.length) for span in batch]
    return read_ranges(ranges, options_of(batch[0].file, recipe))


def _answers(batch: list[Span], answer: Any) -> Iterator[Found]:
    for span, found in zip(batch, answer.result(), strict=True):
        yield span.index, _whole(found, span) if isinstance(found, bytes) else found


def _whole(data: bytes, span: Span) -> bytes | Exception:
    if len(data) == span.length:
        return data
    return OSError(f"{span.file} has changed: {len(data)} of {span.length} bytes at {span.offset}")


def options_of(path: str, recipe: Recipe) -> dict[str, Any]:
    """fsspec options for a file of the source: its own, or the dataset's where that is on the same kind of storage."""
    if recipe.source is not None and recipe.source.storage is not None:
        return dict(recipe.source.storage)
    protocol = recipe.dataset.partition("://")[0] if "://" in recipe.dataset else ""
    return dict(recipe.storage) if protocol and path.startswith(f"{protocol}://") else {}
