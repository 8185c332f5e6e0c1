"""Many URLs → bodies or reasons: concurrent, limited per host

Each row passes robots.txt, request, redirects and a capped body, and is retried if that can help. The limits of a row:

- an attempt has one deadline, `timeout_s`, for everything: DNS, connecting, TLS, every redirect, the body. Waiting for
  a free slot of `per_host`, for a pause that the host asked for, and for its robots.txt (which has the same deadline of
  its own) does not count;
- up to `retries` further attempts, with exponential backoff and jitter, after transient failures: timeouts, broken
  connections, cut bodies, 429 and some 5xx. Retry-After applies to the whole host, for all workers that share its
  limits; one of over a minute ends the row;
- a body of over `max_bytes`, as stated, received or unpacked, is abandoned at once;
- `per_host` applies to all workers of a run together (see `hosts.py`), `concurrency` to each;
- at most `concurrency` rows are in flight or waiting to be taken, so memory stays bounded.

robots.txt: 4xx means that everything is allowed; 429 and 5xx forbid everything (RFC 9309, 2.3.1); if a host cannot be
reached, its rows fail with that reason. Rules are kept for a day, in at most 64 MiB per worker, and read once for all
workers of a run. X-Robots-Tag is obeyed
too. `robots: false` turns both off.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from capstan.pipeline import config
from capstan.pipeline.fetch.client import HttpClient
from capstan.pipeline.fetch.errors import FetchError
from capstan.pipeline.fetch.lenient import LenientConnector
from capstan.pipeline.fetch.resolver import Resolver
from capstan.pipeline.fetch.robots_cache import RobotsCache
from capstan.pipeline.units.shared import Shared


@dataclass(frozen=True, slots=True)
class Fetched:
    """The outcome of one URL: `data`, or None and one of `records.REASONS` with a detail for people."""

    url: str
    data: bytes | None
    reason: str = ""
    detail: str = ""


class Fetcher:
    """Fetches many URLs. Keep one per worker: it caches hosts' robots.txt between calls, in bounded memory.

    `resolve` maps host → "ip:port" on this machine, like curl --resolve; such hosts are exempt from the rule against
    private addresses. `backoff_s` is the first pause before another attempt; it doubles. `shared` is what it shares
    with other workers; without, it has all slots of every host.
    """

    def __init__(
        self,
        fetch: config.Fetch,
        resolve: Mapping[str, str] | None = None,
        *,
        backoff_s: float = 0.5,
        shared: Shared | None = None,
    ) -> None:
        self.fetch, self.backoff_s, self.shared = fetch, backoff_s, shared
        self.resolve = {host.lower(): address for host, address in (resolve or {}).items()}
        self._rules = RobotsCache()

    async def fetch_all(self, urls: Sequence[str]) -> AsyncIterator[tuple[int, Fetched]]:
        """Yield (index into `urls`, outcome) for every URL, in the order in which they complete."""
        done: asyncio.Queue[tuple[int, Fetched] | None] = asyncio.Queue()
        credit = asyncio.Semaphore(self.fetch.concurrency)
        pump = asyncio.create_task(self._pump(urls, done.put_nowait, credit))
        pump.add_done_callback(lambda _: done.put_nowait(None))
        try:
            while (item := await done.get()) is not None:
                yield item
                credit.release()
            await pump  # raises the error that ended it early
        finally:
            pump.cancel()
            await asyncio.wait([pump])

    def fetch_many(self, urls: Sequence[str]) -> Iterator[tuple[int, Fetched]]:
        """Yield the same as `fetch_all`, for synchronous code: the network runs in a thread while the caller works."""
        done: queue.SimpleQueue[tuple[int, Fetched] | BaseException | None] = queue.SimpleQueue()
        network = _Network(self, urls, done)
        network.start()
        taken, together = 0, max(1, self.fetch.concurrency // 4)
        try:
            while (item := done.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
                taken += 1
                if taken == together or done.empty():  # waking the other thread costs more than the rest of a row
                    network.release(taken)
                    taken = 0
        finally:
            network.stop()

    async def _pump(
        self, urls: Sequence[str], emit: Callable[[tuple[int, Fetched]], None], credit: asyncio.Semaphore
    ) -> None:
        """Start a row whenever there is credit; taking a result returns its credit."""
        async with self._open() as client, asyncio.TaskGroup() as rows:

            async def row(index: int, url: str) -> None:
                emit((index, await _row(client, url)))

            for index, url in enumerate(urls):
                await credit.acquire()
                rows.create_task(row(index, url))

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[HttpClient]:
        fetch = self.fetch
        resolver = Resolver(self.resolve, allow_private=fetch.allow_private, lookups=fetch.concurrency)
        connector = LenientConnector(resolver=resolver, use_dns_cache=False, limit=0, keepalive_timeout=5)
        try:
            async with aiohttp.ClientSession(
                connector=connector,
                headers={
                    "User-Agent": fetch.user_agent,
                    "Accept": "image/*,*/*;q=0.8",
                    "Accept-Encoding": "gzip, deflate",
                },
                cookie_jar=aiohttp.DummyCookieJar(),  # no row may change another's response
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # deadlines are kept here
                auto_decompress=False,  # so that unpacking is capped too
                max_field_size=65_536,
            ) as session:
                client = HttpClient(
                    session, fetch, self._rules, backoff_s=self.backoff_s, fixed=self.resolve, shared=self.shared
                )
                try:
                    yield client
                finally:
                    await client.close()
        finally:
            await resolver.close()


async def _row(client: HttpClient, url: str) -> Fetched:
    try:
        return Fetched(url, await client.body_of(url))
    except FetchError as why:
        return Fetched(url, None, why.reason, why.detail)
    except Exception as error:  # noqa: BLE001 - the row boundary: one bad row must not end the unit
        return Fetched(url, None, "read_error", f"{type(error).__name__}: {error}")


class _Network(threading.Thread):
    """The event loop of `fetch_many`: puts results into `done`, and at the end None or an error."""

    def __init__(self, fetcher: Fetcher, urls: Sequence[str], done: queue.SimpleQueue) -> None:
        super().__init__(name="capstan-fetch", daemon=True)
        self._fetcher, self._urls, self._done = fetcher, urls, done
        self._loop = asyncio.new_event_loop()
        self._credit = asyncio.Semaphore(fetcher.fetch.concurrency)
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def run(self) -> None:
        end: BaseException | None = None
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._main())
            except asyncio.CancelledError:
                pass  # `stop` was called: nothing reads the results
            except Exception as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
                end = error
        self._done.put(end)

    async def _main(self) -> None:
        self._task = asyncio.current_task()
        if not self._stopped:
            await self._fetcher._pump(self._urls, self._done.put, self._credit)

    def release(self, count: int) -> None:
        """Return the credit of `count` results that were taken."""

        def give_back() -> None:
            for _ in range(count):
                self._credit.release()

        self._call(give_back)

    def stop(self) -> None:
        """Cancel all rows in flight and wait for the thread."""
        self._stopped = True
        self._call(lambda: self._task.cancel() if self._task else None)
        self.join()

    def _call(self, what: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:
            assert self._loop.is_closed()  # all rows were done
