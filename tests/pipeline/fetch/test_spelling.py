"""URLs are sent as written, and heads of responses taken as browsers take them: a raw server sees the bytes."""

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest
from web_site import BODY, Site, fetch

from capstan.pipeline.fetch.fetcher import Fetched
from capstan.pipeline.fetch.urls import as_sent

Answer = bytes | Callable[[bytes], bytes]


def ok(headers: str = "", body: bytes = BODY) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nConnection: close\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode("latin-1") + body


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running:
        yield running


class Server:
    """Answers by the target of a request; `targets` and `heads` are what came."""

    def __init__(self, site: Site, answers: dict[str, Answer]) -> None:
        self.targets, self.heads = list[str](), list[bytes]()
        self._answers = answers
        self.port = site.raw(self._handle)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        target = head.split(b" ")[1].decode("latin-1")
        if target != "/robots.txt":
            self.targets.append(target)
            self.heads.append(head)
        answer = self._answers.get(target, b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.write(answer(head) if callable(answer) else answer)
        await writer.drain()
        writer.close()


def get(site: Site, server: Server, url: str) -> Fetched:
    return fetch(site, url.replace("AT", f"127.0.0.1:{server.port}"), allow_private=True, retries=0)


@pytest.mark.parametrize("host", ["a b.org", "ü\x01b.org", "a%2Fb.org", "ü%00.org", "a<b.org", "ü|b.org", "a\x7fb.org"])
def test_a_host_with_what_no_name_has_is_no_url(host: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        as_sent(f"http://{host}/x.jpg")
    with pytest.raises(ValueError, match=r"\w"):
        as_sent(f"//{host}/x.jpg", as_sent("http://a.org/"))


def test_a_path_of_a_hundred_thousand_steps_takes_no_time() -> None:
    start = time.process_time()
    assert as_sent("http://a.org" + "/a" * 100_000 + "/.." * 100_000).path == "/"
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("/foo%27bar%2Cbaz%3A%7E.jpg", "/foo%27bar%2Cbaz%3A%7E.jpg"),
        ("/a.jpg?s=%2b%27%7e+x,y&amp;w=80", "/a.jpg?s=%2b%27%7e+x,y&amp;w=80"),
        ("/a'b,c:~(d)[e]|f.jpg", "/a'b,c:~(d)[e]|f.jpg"),
        ("/a b/é.jpg?ü=1 2", "/a%20b/%C3%A9.jpg?%C3%BC=1%202"),
        ("/100%.jpg?50%", "/100%25.jpg?50%25"),
        (" /tab\tbed.j\npg \n", None),
        ("/a.jpg#part?not=query", "/a.jpg"),
        ("/x/../a/./b/%2E%2e/c.jpg", "/a/c.jpg"),
        ("\\back\\slash.jpg?q=a\\b", "/back/slash.jpg?q=a\\b"),
        ("", "/"),
        ("?q=1", "/?q=1"),
    ],
)
def test_the_spelling_of_a_url(site: Site, written: str, sent: str | None) -> None:
    target = sent or "/tabbed.jpg"
    server = Server(site, {target: ok()})
    assert get(site, server, f"http://AT{written.strip(' ') if sent is None else written}").data == BODY
    assert server.targets == [target]


@pytest.mark.parametrize(
    ("location", "sent"),
    [
        (b"/bucket/foo%27b%7ear.jpg?X=1&Signature=a%2Bb%3D", "/bucket/foo%27b%7ear.jpg?X=1&Signature=a%2Bb%3D"),
        ("/synsprøve.jpg".encode(), "/synspr%C3%B8ve.jpg"),
        ("/synsprøve.jpg".encode("latin-1"), "/synspr%F8ve.jpg"),
        (b"b%2c.jpg", "/folder/b%2c.jpg"),
        (b"?x=%7e", "/folder/a.jpg?x=%7e"),
        (b"/r s/x y.jpg", "/r%20s/x%20y.jpg"),
    ],
)
def test_the_spelling_of_a_redirect(site: Site, location: bytes, sent: str) -> None:
    moved = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    server = Server(site, {"/folder/a.jpg": moved, sent: ok()})
    assert get(site, server, "http://AT/folder/a.jpg").data == BODY
    assert server.targets == ["/folder/a.jpg", sent]


@pytest.mark.parametrize(
    "answer",
    [
        ok("Content-Encoding: UTF-8\r\n"),
        ok("Content-Encoding: binary\r\n"),
        ok("Content-Encoding: \r\n"),
        ok("X-XSS-Protection=1;\r\n"),
        ok("just words\r\n"),
        ok("X-Powered-By: a\x01b\r\n"),
        ok("X-Title: caf\xe9\r\n"),
        ok(f"Content-Length: {len(BODY)}\r\n"),
        ok().replace(b"\r\n", b"\n", 4),
        b"HTTP/1.1 103 Early Hints\r\nbroken line\r\n\r\n" + ok("broken line\r\n"),
        b"HTTP/1.1 200\r\nContent-Type: image/jpeg\r\n\r\n" + BODY,
    ],
    ids=range(11),
)
def test_heads_as_browsers_take_them(site: Site, answer: bytes) -> None:
    assert get(site, Server(site, {"/a.jpg": answer}), "http://AT/a.jpg").data == BODY


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        ok(f"Content-Length: {len(BODY) + 1}\r\n"),
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000,
        b"HTTP/1.1 200 OK\r\nX: cut",
    ],
)
def test_no_status_is_named_that_no_server_sent(site: Site, answer: bytes) -> None:
    found = get(site, Server(site, {"/a.jpg": answer}), "http://AT/a.jpg")
    assert (found.data, found.reason) == (None, "connect")
    assert "400" not in found.detail


def test_a_cookie_lives_as_long_as_its_exchange(site: Site) -> None:
    def answer(head: bytes) -> bytes:
        if b"Cookie: seen=yes%20=1" in head:
            return ok()
        cookie = b"Set-Cookie: seen=yes%20=1; Path=/\r\n"
        start, end = b"HTTP/1.1 302 Found\r\nLocation: /a.jpg\r\n", b"Content-Length: 0\r\nConnection: close\r\n\r\n"
        return start + cookie + end

    server = Server(site, {"/a.jpg": answer})
    assert get(site, server, "http://AT/a.jpg").data == BODY
    assert get(site, server, "http://AT/a.jpg").data == BODY
    assert [b"Cookie" in head for head in server.heads] == [False, True, False, True]


@pytest.mark.parametrize("url", ["http:///a", "http://h:0/", "http://[::1/", "ftp://h/", "///a", ""])
def test_what_is_not_a_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        as_sent(url)


def test_names_of_hosts_are_encoded() -> None:
    assert str(as_sent("HTTP://Bücher.example:8080/a")) == "http://xn--bcher-kva.example:8080/a"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a size\r\n",
    ],
)
def test_a_body_that_ends_early_names_no_status(site: Site, answer: bytes) -> None:
    found = get(site, Server(site, {"/a.jpg": answer}), "http://AT/a.jpg")
    assert found.data is None
    assert found.reason in ("truncated", "connect")
    assert found.detail
    assert "400" not in found.detail


def test_many_encodings_are_refused(site: Site) -> None:
    answer = ok(f"Content-Encoding: {', '.join(['gzip'] * 1201)}\r\n")
    found = get(site, Server(site, {"/a.jpg": answer}), "http://AT/a.jpg")
    assert (found.reason, found.detail) == ("unsupported", "1201 Content-Encodings")


@pytest.mark.parametrize("count", [8, 9])
def test_a_flood_of_interim_responses_ends(site: Site, count: int) -> None:
    answer = b"HTTP/1.1 103 Early Hints\r\n\r\n" * count + ok()
    found = get(site, Server(site, {"/a.jpg": answer}), "http://AT/a.jpg")
    assert (found.data == BODY) == (count == 8)
    assert found.reason == ("" if count == 8 else "connect")
