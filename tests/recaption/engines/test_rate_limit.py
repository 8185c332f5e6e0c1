"""The pace of requests, by a clock that only sleeping moves: nothing here waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from capstan.recaption.engines import rate_limit
from capstan.recaption.engines.rate_limit import LONGEST_RETRY_AFTER_S, RateLimiter, Retries, requested_wait


class Clock:
    """Seconds; `then` is done in the middle of the next sleep."""

    def __init__(self) -> None:
        self.now = 100.0
        self.then: Callable[[], None] | None = None

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds / 2
        if then := self.then:
            self.then = None
            then()
        self.now += seconds / 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rate_limit.time, "monotonic", made.monotonic)
    monkeypatch.setattr(rate_limit.asyncio, "sleep", made.sleep)
    return made


def gone(clock: Clock, one: RateLimiter, count: int) -> list[float]:
    """When each of `count` requests goes, in seconds from the start."""
    times = []
    for _ in range(count):
        asyncio.run(one.wait(1))
        times.append(clock.now - 100)
    return times


def test_goes_evenly(clock: Clock) -> None:
    assert gone(clock, RateLimiter(60), 3) == [0, 1, 2]
    assert gone(clock, RateLimiter(None), 2) == [2, 2]


def test_a_hold_holds_those_that_already_wait(clock: Clock) -> None:
    one = RateLimiter(60)
    assert gone(clock, one, 1) == [0]
    clock.then = lambda: one.hold(10)  # half a second before the next one's turn
    assert gone(clock, one, 3) == [11, 12, 13]


def test_a_longer_hold_prolongs_a_shorter_one(clock: Clock) -> None:
    one = RateLimiter(None)
    one.hold(4)
    one.hold(1)
    clock.then = lambda: one.hold(6)  # after 2 of the 4 seconds
    assert gone(clock, one, 2) == [8, 8]


def test_what_a_server_asks_for_holds_every_queue(clock: Clock) -> None:
    requests, tokens = RateLimiter(None), RateLimiter(None)
    assert asyncio.run(Retries(1).again(5.0, requests, tokens))
    clock.now = 100.0
    assert gone(clock, tokens, 1) == [5]
    clock.now = 100.0
    assert gone(clock, requests, 1) == [5]


def test_a_server_is_not_waited_for_without_limit() -> None:
    assert requested_wait({"Retry-After": "86400"}) == LONGEST_RETRY_AFTER_S
    assert requested_wait({"retry-after-ms": "250", "Retry-After": "9"}) == 0.25
    assert requested_wait({}) == 0.0
