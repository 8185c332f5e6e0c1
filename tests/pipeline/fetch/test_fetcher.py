"""Fetching from a real web site on loopback: what goes well, and the limits that hold for many rows at once."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
import zlib
from collections.abc import Iterator

import pytest
from aiohttp import web
from web_site import BODY, HOST, Site, fetch, fetcher

from capstan.pipeline import config
from capstan.pipeline.fetch.fetcher import Fetched


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running:
        yield running


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
        ("/a%2Fb/c d.jpg?q=a b", "/a%2Fb/c%20d.jpg?q=a%20b"),
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
