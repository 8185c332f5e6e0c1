"""What a real web site on loopback asks of robots is obeyed while fetching."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator

import pytest
from aiohttp import web
from web_site import BODY, Site, fetch, fetcher, reason

from capstan.pipeline.fetch.robots import ALL_ALLOWED, parse
from capstan.pipeline.fetch.robots_cache import RobotsCache


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running:
        yield running


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


def test_rules_of_many_hosts_take_bounded_memory_and_those_in_use_stay() -> None:
    text = "User-agent: *\n" + "".join(f"Disallow: /private/{number}\n" for number in range(60))
    known, rules = RobotsCache(most_bytes=200_000), parse(text, "capstan")
    for number in range(1000):
        known.put(f"http://{number}.test", rules, 3600)
        assert known.get("http://0.test") is rules
    held = len(known)
    assert 100 < held < 200
    assert known.get("http://1.test") is None
    assert known.get("http://999.test") is rules
    large = parse("User-agent: *\n" + "".join(f"Disallow: /{number}\n" for number in range(9_000)), "capstan")
    known.put("http://large.test", large, 3600)
    assert known.get("http://large.test") is large
    assert len(known) < held - 30  # it takes the room of many others


def test_rules_are_forgotten_when_their_time_is_over() -> None:
    known = RobotsCache()
    known.put("http://old.test", ALL_ALLOWED, -1)
    assert known.get("http://old.test") is None
    for number in range(100):
        known.put(f"http://{number}.test", ALL_ALLOWED, -1)
    assert len(known) <= 1


def test_a_forgotten_robots_txt_is_asked_for_again(site: Site) -> None:
    site.page("/robots.txt", b"User-agent: *\nDisallow: /private/\n")
    one = fetcher(site)
    one._rules = RobotsCache(most_bytes=0)
    for times in (1, 2):
        found = dict(one.fetch_many([site.url("/private/a.jpg")]))
        assert found[0].reason == "robots"
        assert site.asked("/robots.txt") == times


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
