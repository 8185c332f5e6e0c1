"""Workers that fetch at the same time are one to a host: its limit, its pauses and its robots.txt count once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from aiohttp import web
from web_site import BODY, Site, fetcher

from capstan.pipeline.fetch.fetcher import Fetched
from capstan.pipeline.fetch.host_limits import Answer, HostLimits


class InProcess:
    """The shared object, for workers that are threads of this process."""

    def __init__(self, limits: HostLimits) -> None:
        self.limits, self.lock, self.calls, self.out = limits, threading.Lock(), 0, False

    def key_of(self, name: str) -> int:
        return hash(name) % 3

    async def call(self, key: int, method: str, *arguments: Any) -> Answer:
        if self.out:
            raise ConnectionError("out")
        with self.lock:
            self.calls += 1
            answer: Answer = getattr(self.limits, method)(*arguments)
            return answer


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running:
        yield running


def together(site: Site, workers: int, urls: list[str], shared: InProcess, **settings: Any) -> list[Fetched]:
    def work(_: int) -> list[Fetched]:
        one = fetcher(site, **settings)
        one.shared = shared
        return [fetched for _, fetched in one.fetch_many(urls)]

    with ThreadPoolExecutor(workers) as pool:
        return [fetched for found in pool.map(work, range(workers)) for fetched in found]


@pytest.mark.parametrize("workers", [2, 8])
def test_a_host_sees_its_limit_however_many_workers_there_are(site: Site, workers: int) -> None:
    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(0.02)
        return web.Response(body=BODY)

    site.pages["/a"] = slow
    shared = InProcess(HostLimits(4))
    found = together(site, workers, [site.url("/a")] * 30, shared, concurrency=20, per_host=4)
    assert [fetched.reason for fetched in found] == [""] * 30 * workers
    assert site.asked("/a") == 30 * workers
    assert 2 <= site.most_at_once <= 4
    assert site.asked("/robots.txt") == 1
    assert shared.limits.lent("pictures.test") == 0, "all slots are given back"


def test_a_pause_that_one_worker_is_asked_for_holds_for_the_others(site: Site) -> None:
    answers = iter([web.Response(status=429, headers={"Retry-After": "2"})])

    async def page(_: web.Request) -> web.Response:
        return next(answers, None) or web.Response(body=BODY)

    site.pages["/a"] = page
    found = together(
        site, 3, [site.url("/a")] * 4, InProcess(HostLimits(1)), per_host=1, retries=1, robots=False, concurrency=4
    )
    assert [fetched.reason for fetched in found] == [""] * 12
    times = sorted(at for path, _, at in site.seen if path == "/a")
    assert times[1] - times[0] >= 1.9


def test_rules_that_could_not_be_read_are_shared_too(site: Site) -> None:
    site.page("/robots.txt", b"", 503)
    site.page("/a")
    found = together(site, 3, [site.url("/a")] * 2, InProcess(HostLimits(4)))
    assert {fetched.reason for fetched in found} == {"robots"}
    assert site.asked("/robots.txt") == 1


def test_rows_wait_while_the_shared_object_is_out(site: Site) -> None:
    site.page("/a")
    shared = InProcess(HostLimits(4))
    shared.out = True
    threading.Timer(0.6, lambda: setattr(shared, "out", False)).start()
    start = time.monotonic()
    found = together(site, 1, [site.url("/a")] * 3, shared)
    assert [fetched.reason for fetched in found] == [""] * 3
    assert time.monotonic() - start >= 0.6


def test_an_error_of_the_shared_object_ends_the_fetch_and_is_no_rows_fault(site: Site) -> None:
    site.page("/a")
    shared = InProcess(HostLimits(4))
    shared.limits = None  # type: ignore[assignment]
    with pytest.raises(AttributeError, match="exchange"):
        together(site, 1, [site.url("/a")] * 3, shared)


def test_exchanges_are_few(site: Site) -> None:
    site.page("/a")
    shared = InProcess(HostLimits(8))
    start = time.monotonic()
    together(site, 1, [site.url("/a")] * 300, shared)
    assert shared.calls <= 10 + 50 * (time.monotonic() - start)
