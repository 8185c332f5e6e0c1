"""A real web site on loopback that does everything wrong: each failure reason, and what is tried again."""

from __future__ import annotations

import asyncio
import gzip
import socket
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from web_site import BODY, HOST, Handler, Site, fetch, fetcher, reason

from capstan.pipeline import config
from capstan.pipeline.fetch import resolver
from capstan.pipeline.fetch.fetcher import Fetcher
from capstan.pipeline.records import is_reason


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running:
        yield running


# Reasons -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "", "no address", "/etc/passwd", "file:///etc/passwd", "ftp://example.org/a.jpg", "data:image/png;base64,AAAA",
        "http://", "http:///a.jpg", "http://[::1/a.jpg", "http://example.org:99999/a.jpg", "http://example.org:0/",
        "javascript:alert(1)", "http://\udcff.org/",
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
    monkeypatch.setattr("capstan.pipeline.fetch.client.zlib.decompressobj", lambda wbits: Watched(wbits=wbits))
    for encoding, body in (("gzip", bomb), ("gzip, gzip", gzip.compress(bomb))):
        assert reason(site, site.page("/a", body, Content_Encoding=encoding), max_bytes=200_000) == "too_large_bytes"
    assert max(map(len, made)) <= 200_001


def test_packed_bodies_that_are_damaged_or_strange(site: Site) -> None:
    packed = gzip.compress(BODY)
    assert reason(site, site.page("/cut", packed[:-20], Content_Encoding="gzip")) == "truncated"
    assert reason(site, site.page("/bad", packed[:20] + bytes(200), Content_Encoding="gzip")) == "corrupt"
    assert fetch(site, site.page("/lie", b"no gzip at all", Content_Encoding="gzip")).data == b"no gzip at all"
    assert reason(site, site.page("/br", BODY, Content_Encoding="br")) == "unsupported"
    members = gzip.compress(b"x") * 1000
    assert reason(site, site.page("/many", members, Content_Encoding="gzip")) == "corrupt"


def test_empty(site: Site) -> None:
    assert reason(site, site.page("/a", b"")) == "empty"
    assert reason(site, site.page("/b", gzip.compress(b""), Content_Encoding="gzip")) == "empty"


PACKED_CHUNKS = b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n"


def test_a_cut_body(site: Site) -> None:
    url, _ = cut(site, PACKED_CHUNKS)
    assert reason(site, url, allow_private=True, robots=False) == "truncated"


@pytest.mark.parametrize(
    "framing", [b"Transfer-Encoding: chunked\r\n\r\n5\r\nwhole\r\n", b"Content-Length: 1000\r\n\r\nwhole"]
)
def test_a_body_without_an_end_is_taken_once_retries_do_not_help(site: Site, framing: bytes) -> None:
    """The image tells whether it is whole: decoding a part of one ends with `truncated` as well."""
    url, tries = cut(site, framing)
    assert fetch(site, url, allow_private=True, robots=False, retries=2).data == b"whole"
    assert len(tries) == 3


@pytest.mark.parametrize(
    ("bytes_", "found"), [("bytes 0-3/4", ""), ("bytes 0-3/9", "http_206"), ("bytes 1-4/4", "http_206")]
)
def test_a_partial_response_that_has_all(site: Site, bytes_: str, found: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 206 Partial Content\r\nContent-Range: {bytes_}\r\nContent-Length: 4\r\n\r\n"
        writer.write(head.encode() + b"body")
        writer.close()

    assert fetch(site, f"http://127.0.0.1:{site.raw(answer)}/a.jpg", allow_private=True, robots=False).reason == found


def cut(site: Site, framing: bytes) -> tuple[str, list[int]]:
    """Return the URL of a page that ends after `framing`, and a list that grows with each request."""
    tries = list[int]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        tries.append(1)
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing)
        writer.close()

    return f"http://127.0.0.1:{site.raw(answer)}/a.jpg", tries


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
    monkeypatch.setattr(resolver, "_getaddrinfo", answers.__getitem__)
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

    monkeypatch.setattr(resolver, "_getaddrinfo", answer)
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
    assert fetch(site, url, allow_private=True, robots=False, retries=3, timeout_s=3).data == b"body"
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
