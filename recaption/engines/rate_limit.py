"""When a server may be asked again: limits a minute, what it says of waiting, and growing waits after failures."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final

FIRST_WAIT_S: Final = 0.5  # doubled with each failure
LONGEST_WAIT_S: Final = 60.0
LONGEST_ASKED_S: Final = 600.0  # a server that asks for a longer wait is not waited for so long


class RateLimiter:
    """Lets through so much a minute, evenly, and nothing before `hold` is over; in one process."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self._free = 0.0  # time.monotonic() from which on the next may go
        self._held_until = 0.0
        self._held_s = 0.0  # in all: how much later goes what had its turn before

    async def wait(self, amount: float) -> None:
        """Return when `amount` may go."""
        start, held_s = max(time.monotonic(), self._free, self._held_until), self._held_s
        if self.per_minute is not None:
            self._free = start + amount * 60 / self.per_minute
        while (left := start + self._held_s - held_s - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def correct(self, amount: float) -> None:
        """So much more (or less) went than was waited for."""
        if self.per_minute is not None:
            self._free += amount * 60 / self.per_minute

    def hold(self, seconds: float) -> None:
        """Nothing goes for so long: the whole queue moves back, and keeps its distances."""
        now = time.monotonic()
        if (longer := now + seconds - max(now, self._held_until)) > 0:
            self._held_until = now + seconds
            self._held_s += longer
            self._free = max(now, self._free) + longer


class Retries:
    """Of one request: at most `most`, with waits that double and vary, and are as long as the server asks for."""

    def __init__(self, most: int) -> None:
        self.left, self.wait_s = most, FIRST_WAIT_S

    async def again(self, asked_s: float | None, *paces: RateLimiter) -> bool:
        """Wait before asking again; False where that is of no use (`asked_s` is None) or was done often enough.

        What the server asks for (`asked_s` > 0) holds all of its requests, wherever in `paces` they wait.
        """
        if asked_s is None or not self.left:
            return False
        for pace in paces if asked_s else ():
            pace.hold(asked_s)
        # Full jitter (Brooker 2015): clients that failed together do not come back together.
        await asyncio.sleep(asked_s + random.uniform(0, self.wait_s))
        self.left, self.wait_s = self.left - 1, min(2 * self.wait_s, LONGEST_WAIT_S)
        return True


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to be waited (RFC 9110, 10.2.3: seconds or a date); 0 where it says nothing."""
    if milliseconds := headers.get("retry-after-ms"):
        return _bounded(milliseconds, 1e-3)
    said = headers.get("Retry-After", "")
    if said and not said.strip().replace(".", "", 1).isdigit():
        try:
            return min(max(0.0, parsedate_to_datetime(said).timestamp() - time.time()), LONGEST_ASKED_S)
        except ValueError:
            return 0.0
    return _bounded(said or "0", 1.0)


def _bounded(number: str, unit: float) -> float:
    try:
        return min(max(0.0, float(number) * unit), LONGEST_ASKED_S)
    except ValueError:
        return 0.0
