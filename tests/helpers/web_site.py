"""A real web site on loopback that a test can make do everything wrong, and what it takes to fetch from it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from capstan.pipeline import config
from capstan.pipeline.fetch.fetcher import Fetched, Fetcher
from capstan.pipeline.records import is_reason

HOST = "pictures.test"
BODY = b"\xff\xd8\xff image " * 500

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Site:
    """A web server in a thread. `pages` maps a path to its handler; `seen` lists the requests as (path, host, time)."""

    def __init__(self) -> None:
        self.pages: dict[str, Handler] = {}
        self.seen: list[tuple[str, str, float]] = []
        self.at_once = self.most_at_once = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Site:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        self._raw: list[asyncio.Server] = []

    async def _stop(self) -> None:
        for server in self._raw:
            server.close()
        await self._runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append((request.raw_path, request.host, time.monotonic()))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            page = self.pages.get(request.path)
            return await page(request) if page else web.Response(status=404)
        finally:
            self.at_once -= 1

    def raw(self, handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> int:
        """The port of a server that does not speak HTTP itself: `handle` controls the connection."""

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await handle(reader, writer)
            finally:
                writer.close()

        async def start() -> int:
            self._raw.append(await asyncio.start_server(connected, "127.0.0.1", 0))
            return self._raw[-1].sockets[0].getsockname()[1]

        return asyncio.run_coroutine_threadsafe(start(), self._loop).result()

    def page(self, path: str, body: bytes = BODY, status: int = 200, **headers: str) -> str:
        """A plain page; header names with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}

        async def answer(_: web.Request) -> web.Response:
            return web.Response(body=body, status=status, headers=named)

        self.pages[path] = answer
        return self.url(path)

    def url(self, path: str) -> str:
        return f"http://{HOST}{path}"

    def asked(self, path: str) -> int:
        return sum(seen == path for seen, _, _ in self.seen)


def fetcher(site: Site, **settings: Any) -> Fetcher:
    settings = {"timeout_s": 5, "retries": 0, **settings}
    return Fetcher(config.Fetch(**settings), {HOST: f"127.0.0.1:{site.port}"}, backoff_s=0.01)


def fetch(site: Site, url: str, **settings: Any) -> Fetched:
    ((index, fetched),) = fetcher(site, **settings).fetch_many([url])
    assert index == 0
    assert fetched.url == url
    assert (fetched.data is None) == is_reason(fetched.reason), fetched
    return fetched


def reason(site: Site, url: str, **settings: Any) -> str:
    return fetch(site, url, **settings).reason
