"""The rules of many origins, in bounded memory"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final

from capstan.pipeline.fetch import robots
from capstan.pipeline.fetch.errors import FetchError

_RULES_BYTES: Final = 64 * 1024**2  # about 30,000 sites with 60 rules each, or 90,000 without any


class RobotsCache:
    """The rules of many origins' robots.txt, each kept for a limited time. The least recently used go first."""

    def __init__(self, most_bytes: int = _RULES_BYTES) -> None:
        self._most, self._size = most_bytes, 0
        self._known: OrderedDict[str, tuple[float, robots.Rules | FetchError]] = (
            OrderedDict()
        )  # until, monotonic seconds

    def get(self, origin: str) -> robots.Rules | FetchError | None:
        """Return the rules of an origin; None if they are unknown or too old."""
        entry = self.entry(origin)
        return None if entry is None else entry[0]

    def entry(self, origin: str) -> tuple[robots.Rules | FetchError, float] | None:
        """Return the rules of an origin and how many seconds they last; None if they are unknown or too old."""
        if (entry := self._known.get(origin)) is None:
            return None
        left = entry[0] - time.monotonic()
        if left < 0:
            self._forget(origin)
            return None
        self._known.move_to_end(origin)
        return entry[1], left

    def put(self, origin: str, rules: robots.Rules | FetchError, last_s: float) -> None:
        self._forget(origin)
        now = time.monotonic()
        self._known[origin] = (now + last_s, rules)
        self._size += self._cost(rules)
        while self._size > self._most or (self._known and self._known[next(iter(self._known))][0] < now):
            self._forget(next(iter(self._known)))

    def __len__(self) -> int:
        return len(self._known)

    def _forget(self, origin: str) -> None:
        if (entry := self._known.pop(origin, None)) is not None:
            self._size -= self._cost(entry[1])

    @staticmethod
    def _cost(rules: robots.Rules | FetchError) -> int:
        """Return roughly how many bytes the rules occupy, including the objects around the text."""
        return 700 + (len(rules.detail) if isinstance(rules, FetchError) else rules.size)
