"""Rate limits, Retry-After, and waits that grow after failures"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Final

from capstan.pipeline.retry_after import retry_after

FIRST_WAIT_S: Final = 0.5  # doubled with each failure
LONGEST_WAIT_S: Final = 60.0
LONGEST_RETRY_AFTER_S: Final = 600.0  # a longer Retry-After is cut to this


class RateLimiter:
    """A rate limit within one process: evenly spaced, and paused by `hold`."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self._free = 0.0  # time.monotonic() at which the next may start
        self._held_until = 0.0
        self._held_s = 0.0  # total time by which the queue was moved back

    async def wait(self, amount: float) -> None:
        """Wait until `amount` may be sent."""
        start, held_s = max(time.monotonic(), self._free, self._held_until), self._held_s
        if self.per_minute is not None:
            self._free = start + amount * 60 / self.per_minute
        while (left := start + self._held_s - held_s - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def correct(self, amount: float) -> None:
        """Account for `amount` more (or less) than was waited for."""
        if self.per_minute is not None:
            self._free += amount * 60 / self.per_minute

    def hold(self, seconds: float) -> None:
        """Pause for the given number of seconds: the whole queue moves back and keeps its spacing."""
        now = time.monotonic()
        if (longer := now + seconds - max(now, self._held_until)) > 0:
            self._held_until = now + seconds
            self._held_s += longer
            self._free = max(now, self._free) + longer


class Retries:
    """The retries of one request: at most `most`, with jittered waits that double, and at least Retry-After."""

    def __init__(self, most: int) -> None:
        self.left, self.wait_s = most, FIRST_WAIT_S

    async def again(self, retry_after_s: float | None, *limiters: RateLimiter) -> bool:
        """Wait before the next attempt; return False if there is none: no retries left, or `retry_after_s` is None.

        A server's Retry-After (`retry_after_s` > 0) pauses all requests in the queues of `limiters`.
        """
        if retry_after_s is None or not self.left:
            return False
        for limiter in limiters if retry_after_s else ():
            limiter.hold(retry_after_s)
        # Full jitter (Brooker 2015): clients that failed at the same time do not retry at the same time.
        await asyncio.sleep(retry_after_s + random.uniform(0, self.wait_s))
        self.left, self.wait_s = self.left - 1, min(2 * self.wait_s, LONGEST_WAIT_S)
        return True


def requested_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds that a response asks to wait before the next request; 0 if it names none."""
    if milliseconds := retry_after(headers.get("retry-after-ms", "")):
        return min(milliseconds / 1000, LONGEST_RETRY_AFTER_S)
    return min(retry_after(headers.get("Retry-After", "")) or 0.0, LONGEST_RETRY_AFTER_S)
