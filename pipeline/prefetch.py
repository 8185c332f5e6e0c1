"""Map a function over items in threads, a few items ahead of their use"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 4


def ahead(do: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `do(item)` in order, working a few items ahead in threads. Memory stays bounded."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="ahead") as pool:
        for item in items:
            waiting.append(pool.submit(do, item))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
