"""Work on some items while the results of those before them are used: threads for what waits on disks or hashes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 4


def ahead(do: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`do` of each item, in order; at most a few are done before they are asked for, so that memory stays bounded."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="ahead") as pool:
        for item in items:
            waiting.append(pool.submit(do, item))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
