"""Fetching from a real web site on loopback that does everything wrong: each failure reason, limit and courtesy."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import addresses, config
from pipeline.fetch import Fetched, Fetcher
from pipeline.records import is_reason

HOST = "pictures.test"
BODY = b"\xff\xd8\xff picture " * 500

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
        """The port of a server that speaks no HTTP by itself: `handle` does as it likes with the connection."""

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


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running:
        yield running


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


# What goes well ------------------------------------------------------------------------------------------------------


def test_fetches_a_body_and_says_who_asks(site: Site) -> None:
    agents = []

    async def page(request: web.Request) -> web.Response:
        agents.append(request.headers["User-Agent"])
        return web.Response(body=BODY)

    site.pages["/a.jpg"] = page
    assert fetch(site, site.url("/a.jpg")).data == BODY
    assert agents == [config.Fetch().user_agent]
    assert site.seen[-1][1] == HOST  # the host's name, not the address that `resolve` gave


def test_every_row_is_answered_once_whichever_way_it_is_asked(site: Site) -> None:
    urls = [site.page(f"/{n}.jpg", b"%d" % n) if n % 3 else site.url(f"/missing-{n}") for n in range(50)]

    async def all_of_them() -> list[tuple[int, Fetched]]:
        return [item async for item in fetcher(site, concurrency=7).fetch_all(urls)]

    for found in (list(fetcher(site, concurrency=7).fetch_many(urls)), asyncio.run(all_of_them())):
        assert sorted(index for index, _ in found) == list(range(50))
        for index, fetched in found:
            assert fetched.url == urls[index]
            assert fetched.data == (b"%d" % index if index % 3 else None)
            assert fetched.reason == ("" if index % 3 else "http_404")


def test_no_rows(site: Site) -> None:
    assert list(fetcher(site).fetch_many([])) == []


def test_redirects_are_followed(site: Site) -> None:
    site.page("/end.jpg")
    site.page("/two", b"", 308, Location=f"http://{HOST}/end.jpg")
    site.page("/one", b"", 302, Location="two?x=%2F")
    assert fetch(site, site.page("/zero", b"", 301, Location="//pictures.test/one")).data == BODY
    assert [path for path, _, _ in site.seen] == ["/robots.txt", "/zero", "/one", "/two?x=%2F", "/end.jpg"]


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("/a?sig=a%2Fb%2bc+d%3D&x=1#part", "/a?sig=a%2Fb%2bc+d%3D&x=1"),
        ("/a%2Fb/c d.jpg?q=a b", "/a%2Fb/c%20d.jpg?q=a+b"),
        ("/x/../caf\u00e9.jpg?q=\u00e9", "/caf%C3%A9.jpg?q=%C3%A9"),
        ("", "/"),
    ],
)
def test_an_address_is_sent_as_written_where_that_is_legal(site: Site, written: str, sent: str) -> None:
    fetch(site, f"http://{HOST.upper()}{written}")
    fetch(site, site.page("/from", b"", 302, Location=f"http://{HOST}{written}"))
    assert [path for path, _, _ in site.seen if path not in ("/robots.txt", "/from")] == [sent] * 2


@pytest.mark.parametrize("packing", ["gzip", "x-gzip", "deflate", "raw deflate", "gzip, gzip", "identity", "members"])
def test_packed_bodies(site: Site, packing: str) -> None:
    raw = zlib.compressobj(wbits=-15)
    bodies = {
        "gzip": gzip.compress(BODY),
        "x-gzip": gzip.compress(BODY),
        "deflate": zlib.compress(BODY),
        "raw deflate": raw.compress(BODY) + raw.flush(),
        "gzip, gzip": gzip.compress(gzip.compress(BODY)),
        "identity": BODY,
        "members": gzip.compress(BODY[:100]) + gzip.compress(BODY[100:]),
    }
    name = {"raw deflate": "deflate", "members": "gzip"}.get(packing, packing)
    assert fetch(site, site.page("/a", bodies[packing], Content_Encoding=name)).data == BODY


# Reasons -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "", "no address", "/etc/passwd", "file:///etc/passwd", "ftp://example.org/a.jpg", "data:image/png;base64,AAAA",
        "http://", "http:///a.jpg", "http://[::1/a.jpg", "http://example.org:99999/a.jpg", "http://example.org:0/",
        "javascript:alert(1)", "http://\udcff.org/", "//example.org/a.jpg",
    ],
)  # fmt: skip
def test_bad_url(site: Site, url: str) -> None:
    assert reason(site, url) == "bad_url"


@given(url=st.one_of(st.text(max_size=30), st.text(max_size=30).map("http://[::1]:1/{}".format)))
@settings(max_examples=60, deadline=None)
def test_no_text_raises(url: str) -> None:
    ((_, fetched),) = Fetcher(config.Fetch(retries=0, timeout_s=1, robots=False)).fetch_many([url])
    assert fetched.data is None
    assert is_reason(fetched.reason)


def test_unknown_host(site: Site) -> None:
    assert reason(site, "http://nothing.invalid/a.jpg") == "dns"
    assert reason(site, f"http://{'x' * 64}.example/a.jpg") in ("dns", "bad_url")  # no DNS label is that long


def test_connection_refused(site: Site) -> None:
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        assert reason(site, f"http://127.0.0.1:{taken.getsockname()[1]}/", allow_private=True) == "connect"


def test_tls_that_is_none(site: Site) -> None:
    assert reason(site, f"https://127.0.0.1:{site.port}/a.jpg", allow_private=True) == "tls"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", b"SSH-2.0-OpenSSH_9.2\r\n\r\n"])
def test_a_server_that_speaks_no_http(site: Site, answer: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    url = f"http://127.0.0.1:{site.raw(handle)}/a.jpg"
    assert reason(site, url, allow_private=True, robots=False) == "connect"


def test_a_reset_connection(site: Site) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        linger_none = b"\x01\0\0\0\0\0\0\0"  # closing then sends RST
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_none)
        writer.transport.abort()

    url = f"http://127.0.0.1:{site.raw(reset)}/a.jpg"
    assert reason(site, url, allow_private=True, robots=False) == "connect"


@pytest.mark.parametrize("where", ["accept", "headers", "body", "drip"])
def test_a_stall_anywhere_ends_at_the_deadline(site: Site, where: str) -> None:
    """A server that drips a byte now and then must not get beyond the deadline either: it holds for the whole."""

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if where != "accept":
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n")
        if where in ("body", "drip"):
            writer.write(b"Content-Length: 1000\r\n\r\n")
        for _ in range(300):
            writer.write(b"x" if where == "drip" else b"")
            await asyncio.sleep(0.1)

    url = f"http://127.0.0.1:{site.raw(stall)}/a.jpg"
    started = time.monotonic()
    assert reason(site, url, allow_private=True, robots=False, timeout_s=0.5) == "timeout"
    assert time.monotonic() - started < 10


def test_the_deadline_holds_over_redirects(site: Site) -> None:
    async def slowly_on(_: web.Request) -> web.Response:
        await asyncio.sleep(0.3)
        return web.Response(status=302, headers={"Location": "/slow"})

    site.pages["/slow"] = slowly_on
    assert reason(site, site.url("/slow"), timeout_s=1, robots=False) == "timeout"
    assert site.asked("/slow") <= 4


@pytest.mark.parametrize("status", [204, 304, 400, 401, 403, 404, 410, 418, 500, 503])
def test_statuses(site: Site, status: int) -> None:
    assert reason(site, site.page("/a", b"", status)) == f"http_{status}"


def test_a_redirect_to_nowhere(site: Site) -> None:
    assert reason(site, site.page("/a", b"", 302)) == "http_302"
    assert reason(site, site.page("/b", b"", 302, Location="ftp://example.org/")) == "bad_url"
    assert reason(site, site.page("/c", b"", 302, Location="file:///etc/passwd")) == "bad_url"
    assert reason(site, site.page("/d", b"", 302, Location="http://[::1/")) == "bad_url"


def test_redirects_without_end(site: Site) -> None:
    assert reason(site, site.page("/a", b"", 302, Location="/a")) == "redirects"
    assert site.asked("/a") == 9  # eight redirects were followed


def test_too_large(site: Site) -> None:
    limit = len(BODY)
    assert fetch(site, site.page("/a"), max_bytes=limit).data == BODY
    stated = fetch(site, site.url("/a"), max_bytes=limit - 1)
    assert (stated.reason, stated.detail) == ("too_large_bytes", f"{limit} bytes stated")
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()  # chunked: states no length
        await response.prepare(request)
        while True:
            await response.write(bytes(10_000))
            sent += 10_000

    site.pages["/endless"] = endless
    assert reason(site, site.url("/endless"), max_bytes=100_000) == "too_large_bytes"
    assert sent < 50_000_000


def test_a_packed_bomb_is_too_large_and_never_unpacked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(bytes(30_000_000))
    assert len(bomb) < 100_000
    made = []

    class Watched:
        def __init__(self, **options: int) -> None:
            self._real = original(**options)

        def decompress(self, data: bytes, limit: int) -> bytes:
            made.append(self._real.decompress(data, limit))
            return made[-1]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    original = zlib.decompressobj
    monkeypatch.setattr("pipeline.exchange.zlib.decompressobj", lambda wbits: Watched(wbits=wbits))
    for encoding, body in (("gzip", bomb), ("gzip, gzip", gzip.compress(bomb))):
        assert reason(site, site.page("/a", body, Content_Encoding=encoding), max_bytes=200_000) == "too_large_bytes"
    assert max(map(len, made)) <= 200_001


def test_packed_bodies_that_are_damaged_or_strange(site: Site) -> None:
    packed = gzip.compress(BODY)
    assert reason(site, site.page("/cut", packed[:-20], Content_Encoding="gzip")) == "truncated"
    assert reason(site, site.page("/bad", b"no gzip at all", Content_Encoding="gzip")) == "corrupt"
    assert reason(site, site.page("/br", BODY, Content_Encoding="br")) == "unsupported"
    members = gzip.compress(b"x") * 1000
    assert reason(site, site.page("/many", members, Content_Encoding="gzip")) == "corrupt"


def test_empty(site: Site) -> None:
    assert reason(site, site.page("/a", b"")) == "empty"
    assert reason(site, site.page("/b", gzip.compress(b""), Content_Encoding="gzip")) == "empty"


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 1000\r\n\r\nshort", b"Transfer-Encoding: chunked\r\n\r\n8\r\nshort"]
)
def test_a_cut_body(site: Site, framing: bytes) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing)
        writer.close()

    url = f"http://127.0.0.1:{site.raw(cut)}/a.jpg"
    assert reason(site, url, allow_private=True, robots=False) == "truncated"


# Private addresses ---------------------------------------------------------------------------------------------------


LOOPBACK = [
    "127.0.0.1", "127.0.0.1.", "127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "017700000001", "0.0.0.0", "0",
    "localhost", "localhost.", "LOCALHOST", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "127.0.0.1%2e",
    "１２７.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK)
def test_this_machine_is_refused_however_it_is_written(site: Site, host: str) -> None:
    assert reason(site, f"http://{host}:{site.port}/a.jpg", robots=False) in ("private_address", "bad_url", "dns")
    assert site.seen == []


def test_the_plain_spellings_say_private_address(site: Site) -> None:
    for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254", "10.0.0.1"):
        assert reason(site, f"http://{host}:{site.port}/a.jpg") == "private_address"
    site.page("/a.jpg")
    assert fetch(site, f"http://127.0.0.1:{site.port}/a.jpg", allow_private=True).data == BODY
    assert fetch(site, f"http://localhost:{site.port}/a.jpg", allow_private=True).data == BODY


@pytest.mark.parametrize("host", LOOPBACK)
def test_no_redirect_leads_to_this_machine(site: Site, host: str) -> None:
    target = f"http://{host}:{site.port}/inner"
    found = reason(site, site.page("/a", b"", 302, Location=target))
    assert found in ("private_address", "bad_url", "dns")
    assert site.asked("/inner") == 0


def test_a_name_that_resolves_to_a_private_address(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "inner.test": ["127.0.0.1"],
        "mixed.test": ["93.184.216.34", "127.0.0.1"],
        "six.test": ["::ffff:127.0.0.1"],
    }
    monkeypatch.setattr(addresses, "_getaddrinfo", answers.__getitem__)
    for name in answers:
        assert reason(site, f"http://{name}:{site.port}/a.jpg") == "private_address"
    site.page("/a", b"", 302, Location=f"http://inner.test:{site.port}/inner")
    assert reason(site, site.url("/a")) == "private_address"
    assert {host for _, host, _ in site.seen} == {HOST}


def test_a_name_is_looked_up_once_and_what_was_checked_is_what_is_used(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rebinding: the second answer would be private, and nobody asks for it."""
    asked = []

    def answer(host: str) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    monkeypatch.setattr(addresses, "_getaddrinfo", answer)
    urls = [f"http://name.test:{site.port}/{n}" for n in range(20)]
    found = list(fetcher(site, allow_private=True).fetch_many(urls))
    assert {fetched.reason for _, fetched in found} == {"http_404"}
    assert asked == ["name.test"]


# Trying again --------------------------------------------------------------------------------------------------------


def after(failures: int, status: int = 503, **headers: str) -> Handler:
    """A page that answers `status` so many times and then the body."""
    left = failures

    async def page(_: web.Request) -> web.Response:
        nonlocal left
        left -= 1
        if left >= 0:
            return web.Response(status=status, headers={name.replace("_", "-"): headers[name] for name in headers})
        return web.Response(body=BODY)

    return page


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_can_heal_is_tried_again(site: Site, status: int) -> None:
    site.pages["/a"] = after(2, status)
    assert fetch(site, site.url("/a"), retries=2).data == BODY
    site.pages["/b"] = after(3, status)
    assert reason(site, site.url("/b"), retries=2) == f"http_{status}"
    assert site.asked("/b") == 3


@pytest.mark.parametrize("status", [400, 403, 404, 410, 501])
def test_what_cannot_heal_is_not(site: Site, status: int) -> None:
    assert reason(site, site.page("/a", b"", status), retries=3) == f"http_{status}"
    assert site.asked("/a") == 1


def test_broken_connections_stalls_and_cut_bodies_are_tried_again(site: Site) -> None:
    tries = 0

    async def moody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        await reader.readuntil(b"\r\n\r\n")
        if tries == 1:
            writer.transport.abort()
        elif tries == 2:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort")
            writer.close()
        elif tries == 3:
            await asyncio.sleep(30)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody")

    url = f"http://127.0.0.1:{site.raw(moody)}/a.jpg"
    assert fetch(site, url, allow_private=True, robots=False, retries=3, timeout_s=1).data == b"body"
    assert tries == 4


def test_retry_after_is_honoured_for_the_whole_host(site: Site) -> None:
    site.pages["/busy"] = after(1, 429, Retry_After="1")
    site.page("/other")
    urls = [site.url("/busy"), *[site.url("/other")] * 5]
    found = dict(fetcher(site, retries=1, robots=False, per_host=1).fetch_many(urls))
    assert all(fetched.data == BODY for fetched in found.values())
    first, *others = [moment for _, _, moment in site.seen]
    assert min(others) - first > 0.9


def test_retry_after_as_a_date(site: Site) -> None:
    site.pages["/a"] = after(1, 503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")  # has passed
    assert fetch(site, site.url("/a"), retries=1).data == BODY


def test_a_host_that_asks_for_more_than_a_minute_is_left_alone(site: Site) -> None:
    site.pages["/a"] = after(9, 429, Retry_After="3600")
    site.page("/b")
    found = list(fetcher(site, retries=3, robots=False, concurrency=1).fetch_many([site.url("/a"), site.url("/b")]))
    assert [fetched.reason for _, fetched in found] == ["http_429", "http_429"]
    assert len(site.seen) == 1


# Limits --------------------------------------------------------------------------------------------------------------


def test_so_many_at_once_a_host(site: Site) -> None:
    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(0.05)
        return web.Response(body=BODY)

    site.pages["/a"] = slow
    found = list(fetcher(site, concurrency=20, per_host=3, robots=False).fetch_many([site.url("/a")] * 24))
    assert all(fetched.data == BODY for _, fetched in found)
    assert 1 < site.most_at_once <= 3


def test_waiting_for_a_slot_is_not_held_against_a_row(site: Site) -> None:
    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(0.2)
        return web.Response(body=BODY)

    site.pages["/a"] = slow
    found = list(fetcher(site, per_host=1, timeout_s=1.5, robots=False).fetch_many([site.url("/a")] * 10))
    assert {fetched.reason for _, fetched in found} == {""}


def test_look_ahead_is_bounded(site: Site) -> None:
    """While nobody takes results, no more than `concurrency` rows are asked for."""
    urls = [site.page(f"/{n}") for n in range(60)]
    found = fetcher(site, concurrency=5, robots=False).fetch_many(urls)
    next(found)
    time.sleep(0.5)
    assert len(site.seen) <= 6
    assert len(list(found)) == 59


def test_leaving_early_ends_the_network(site: Site) -> None:
    threads = threading.active_count()
    urls = [site.page(f"/{n}") for n in range(60)]
    found = fetcher(site, concurrency=5).fetch_many(urls)
    next(found)
    found.close()
    assert len(site.seen) < 20
    assert [thread.name for thread in threading.enumerate() if thread.name == "capstan-fetch"] == []
    assert threading.active_count() <= threads + 1

    async def first_only() -> None:
        rows = fetcher(site, concurrency=5).fetch_all(urls)
        await anext(rows)
        await rows.aclose()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(first_only())


def test_one_stalled_host_does_not_hold_up_the_others(site: Site) -> None:
    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    site.pages["/never"] = never
    quick = [site.page(f"/{n}") for n in range(20)]
    rows = fetcher(site, concurrency=8, timeout_s=3, robots=False).fetch_many([site.url("/never"), *quick])
    order = [index for index, _ in rows]
    assert order[-1] == 0


# Robots --------------------------------------------------------------------------------------------------------------


def test_robots_txt_is_obeyed_and_asked_for_once(site: Site) -> None:
    site.page("/robots.txt", b"User-agent: *\nDisallow: /private/\nAllow: /private/open\n")
    site.page("/a.jpg")
    site.page("/private/a.jpg")
    site.page("/private/open.jpg")
    paths = ["/a.jpg", "/private/a.jpg", "/private/open.jpg"] * 3
    one = fetcher(site)
    found = dict(one.fetch_many([site.url(path) for path in paths]))
    assert [found[index].reason for index in range(3)] == ["", "robots", ""]
    assert site.asked("/private/a.jpg") == 0
    list(one.fetch_many([site.url("/a.jpg")]))  # the same Fetcher remembers
    assert site.asked("/robots.txt") == 1


def test_robots_txt_holds_for_redirects_too(site: Site) -> None:
    site.page("/robots.txt", b"User-agent: capstan\nDisallow: /private\n")
    site.page("/private.jpg")
    assert reason(site, site.page("/a", b"", 302, Location="/private.jpg")) == "robots"
    assert site.asked("/private.jpg") == 0


@pytest.mark.parametrize(
    ("status", "expected"),
    [(401, ""), (403, ""), (404, ""), (410, ""), (429, "robots"), (500, "robots"), (503, "robots")],
)
def test_a_robots_txt_that_cannot_be_had(site: Site, status: int, expected: str) -> None:
    site.page("/robots.txt", b"User-agent: *\nDisallow: /\n", status)
    assert reason(site, site.page("/a")) == expected
    assert fetch(site, site.url("/a"), robots=False).data == BODY


def test_a_robots_txt_that_stalls_is_a_timeout(site: Site) -> None:
    async def never(_: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    site.pages["/robots.txt"] = never
    found = fetch(site, site.page("/a"), timeout_s=0.5)
    assert found.reason == "timeout"
    assert found.detail.startswith("robots.txt")
    assert site.asked("/a") == 0


def test_a_robots_txt_that_redirects_is_large_or_packed(site: Site) -> None:
    rules = b"User-agent: *\nDisallow: /no\n"
    site.page("/real", rules + b"# padding\n" * 100_000)
    site.page("/robots.txt", b"", 301, Location="/real")
    site.page("/yes")
    assert reason(site, site.page("/no")) == "robots"
    assert reason(site, site.url("/yes"), max_bytes=len(BODY)) == ""
    site.page("/robots.txt", gzip.compress(rules), Content_Encoding="gzip")
    assert reason(site, site.url("/no")) == "robots"
    site.page("/robots.txt", b"", 301, Location="/robots.txt")
    assert reason(site, site.url("/no")) == ""


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("noai", "noai"), ("noimageai", "noai"), ("noindex", "noai"), ("noimageindex", "noai"), ("NoAI", "noai"),
        ("none", "noai"), ("nofollow, noai", "noai"), ("nofollow", ""), ("all", ""), ("", ""),
        ("otherbot: noai", ""), ("otherbot: noai, noindex", ""), ("capstan: noai", "noai"), ("*: noai", "noai"),
        ("otherbot: noai, Capstan: noindex", "noai"), ("max-snippet: 3, noai", "noai"),
        ("unavailable_after: Wed, 25 Jun 2025 15:00:00 PST, noai", "noai"),
    ],
)  # fmt: skip
def test_x_robots_tag(site: Site, header: str, expected: str) -> None:
    assert reason(site, site.page("/a", X_Robots_Tag=header)) == expected
    assert reason(site, site.url("/a"), robots=False) == ""


def test_several_x_robots_tags(site: Site) -> None:
    async def page(_: web.Request) -> web.Response:
        response = web.Response(body=BODY)
        response.headers.add("X-Robots-Tag", "otherbot: nofollow")
        response.headers.add("X-Robots-Tag", "noimageai")
        return response

    site.pages["/a"] = page
    assert reason(site, site.url("/a")) == "noai"
