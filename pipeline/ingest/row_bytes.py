"""Planned rows → the bytes of their source files, or a failure reason, as they arrive"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from capstan.pipeline.config import Fetch, Recipe
from capstan.pipeline.dataset.parts import is_part
from capstan.pipeline.errors import StorageError
from capstan.pipeline.fetch.fetcher import Fetcher
from capstan.pipeline.image.decode import Failure, check_hash
from capstan.pipeline.records import REMOVED
from capstan.pipeline.source.blocklist import is_removed
from capstan.pipeline.source.columns import why_no_text
from capstan.pipeline.source.image_reader import Span, TooLarge, read_images, span_of
from capstan.pipeline.storage.listing import on_disk
from capstan.pipeline.storage.retry import is_unavailable
from capstan.pipeline.units import shared


def read_rows(
    rows: list[dict[str, Any]], recipe: Recipe, resolve: Mapping[str, str]
) -> Iterator[tuple[int, bytes | Failure]]:
    """Yield (index, source file's bytes or failure) for each row, as they arrive; hashes are checked.

    `resolve` maps host → "ip:port" on this machine, for hosts that are served here.
    """
    for index, data in _unchecked(rows, recipe, resolve):
        expected = rows[index]["hash"]
        wrong = check_hash(data, expected) if expected and isinstance(data, bytes) else None
        yield index, wrong or data


def _unchecked(
    rows: list[dict[str, Any]], recipe: Recipe, resolve: Mapping[str, str]
) -> Iterator[tuple[int, bytes | Failure]]:
    spans, remote, most = list[Span](), list[int](), recipe.fetch.max_bytes
    for index, row in enumerate(rows):
        if is_removed(row):
            yield index, Failure(REMOVED)
        elif why := why_no_text(row["extra"], row["caption"]):
            yield index, Failure("bad_caption", why)
        elif row["image"] is not None:
            yield index, row["image"] or Failure("empty", "no bytes in the source's column")
        elif not row["file"]:
            remote.append(index)
        elif row["length"] > most and (row["offset"] or not on_disk(row["file"])):  # files on a disk may have changed
            yield index, _readable(TooLarge(f"{row['length']} bytes"))
        else:
            spans.append(span_of(row, index))
    for index, data in read_images(spans, recipe, most=most):
        yield index, _readable(data)
    if remote:
        fetcher = _fetcher(recipe.fetch, tuple(resolve.items()))
        fetcher.shared = shared()
        for position, fetched in fetcher.fetch_many([rows[index]["url"] for index in remote]):
            failure = Failure(fetched.reason, fetched.detail)
            yield remote[position], fetched.data if fetched.data is not None else failure


def read_sample_parts(
    rows: list[dict[str, Any]], recipe: Recipe, parts: Sequence[str]
) -> Iterator[tuple[int, dict[str, bytes] | Failure]]:
    """Yield (index, files by suffix or failure) for each row whose sample in a tar has any of `parts`."""
    spans, wanted, most = list[Span](), list[tuple[int, str]](), recipe.fetch.max_bytes
    left, found = dict[int, int](), dict[int, dict[str, bytes]]()
    for index, row in enumerate(rows):
        places: dict[str, list[int]] = json.loads(row.get("parts") or "{}")
        own = {part: places[part] for part in parts if part in places}
        large = [part for part, (_, length) in own.items() if length > most]
        if large:
            yield index, _failure(_readable(TooLarge(f"its {large[0]} has {own[large[0]][1]} bytes")))
            continue
        left[index], found[index] = len(own), {}
        for part, (offset, length) in own.items():
            member = f"{span_of(row, index).member.rpartition('.')[0]}.{part}"
            spans.append(Span(row["file"], offset, length, len(wanted), member))
            wanted.append((index, part))
    failed = dict[int, Failure]()
    for number, data in read_images(spans, recipe, most=most):
        index, part = wanted[number]
        content = _readable(data)
        if isinstance(content, bytes) and not is_part(part, content):
            content = Failure("corrupt", f"its {part} is not one")
        if isinstance(content, Failure):
            failed.setdefault(index, content)
        else:
            found[index][part] = content
        left[index] -= 1
        if not left[index]:
            ready = found.pop(index)
            yield index, failed.get(index) or {part: ready[part] for part in parts if part in ready}


def _failure(result: bytes | Failure) -> Failure:
    assert isinstance(result, Failure)
    return result


def _readable(data: bytes | Exception) -> bytes | Failure:
    """Return the bytes, or the failure that an error amounts to.

    Raises StorageError if a later build may read the file: an unavailable storage backend is not recorded as a row
    failure.
    """
    if isinstance(data, StorageError) and is_unavailable(data):
        raise data
    if isinstance(data, TooLarge):
        return Failure("too_large_bytes", f"{data}, fetch.max_bytes allows fewer")
    if isinstance(data, Exception):
        return Failure("read_error", f"{type(data).__name__}: {data}")
    return data or Failure("empty", "the file is empty")


@functools.lru_cache(maxsize=1)
def _fetcher(fetch: Fetch, resolve: tuple[tuple[str, str], ...]) -> Fetcher:
    """Return this worker process's fetcher: one only, since it remembers every host's robots.txt."""
    return Fetcher(fetch, dict(resolve))
