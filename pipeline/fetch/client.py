"""One URL → its body, or a reason: redirects, limits, retries

The limits are described in `capstan.pipeline.fetch.fetcher`, which runs many of these at once.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import ssl
import time
import zlib
from collections.abc import Mapping
from types import TracebackType
from typing import Final

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from capstan.pipeline import config
from capstan.pipeline.fetch import robots
from capstan.pipeline.fetch.errors import FetchError
from capstan.pipeline.fetch.hosts import Host, Hosts
from capstan.pipeline.fetch.resolver import PrivateAddress, check_literal
from capstan.pipeline.fetch.robots_cache import RobotsCache
from capstan.pipeline.fetch.urls import as_sent
from capstan.pipeline.retry_after import retry_after
from capstan.pipeline.units.shared import Shared

_MAX_REDIRECTS: Final = 8
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE_S: Final = 60.0
_MOST_PACKINGS: Final = 2  # Content-Encodings of one body
_MOST_MEMBERS: Final = 64  # in a gzip body; each costs a copy of the data after it
_ROBOTS_BYTES: Final = 512_000  # RFC 9309, 2.5: at least 500 KiB must be read; the rest may be ignored
_RULES_LAST_S: Final = 24 * 3600.0  # RFC 9309, 2.4
_FAILURES_LAST_S: Final = 60.0
_LOST_BEFORE_RULES: Final = frozenset({"dns", "connect", "tls", "timeout", "private_address", "truncated"})


class _Deadline:
    """The seconds left for an attempt. They run only inside `async with`, which may be entered again."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    async def __aenter__(self) -> None:
        self._started = time.monotonic()
        self._timeout = asyncio.timeout(self._left)
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left -= time.monotonic() - self._started
        await self._timeout.__aexit__(kind, error, trace)


class HttpClient:
    """The state that rows fetched together share: the session, the hosts' limits, and the rules of robots.txt.

    `rules` outlives the client; `fixed` hosts are exempt from the rule against private addresses.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        fetch: config.Fetch,
        rules: RobotsCache,
        *,
        backoff_s: float,
        fixed: Mapping[str, str],
        shared: Shared | None = None,
    ) -> None:
        self._session, self._fetch, self._rules = session, fetch, rules
        self._backoff_s, self._fixed = backoff_s, fixed
        self._token = robots.product_token(fetch.user_agent)
        self._hosts = Hosts(fetch.per_host, shared)
        self._requesting: dict[str, asyncio.Task[robots.Rules | FetchError]] = {}

    async def body_of(self, url: str) -> bytes:
        """Return the unpacked body, never empty. Raises FetchError with the reason."""
        return await self._fetch_body(_parse(url))

    async def close(self) -> None:
        """Stop requesting robots.txt, and leave the hosts to other workers. No row may be in flight."""
        for task in list(self._requesting.values()):
            task.cancel()
        await self._hosts.close()

    async def _fetch_body(self, url: URL, *, for_robots: bool = False) -> bytes:
        """Return the body, after retries if they can help. Raises FetchError with the last attempt's reason."""
        attempt = 0
        while True:
            try:
                return await self._attempt(url, for_robots)
            except FetchError as why:
                pause_s = why.pause_s or 0.0
                if not why.is_retryable or attempt == self._fetch.retries or pause_s > _LONGEST_PAUSE_S:
                    if why.body:
                        return why.body
                    raise
                await asyncio.sleep(max(pause_s, self._backoff_s * 2**attempt * random.uniform(0.5, 1.0)))
            attempt += 1

    async def _attempt(self, url: URL, for_robots: bool) -> bytes:
        """Make one attempt: follow redirects to a body and return it."""
        deadline = _Deadline(self._fetch.timeout_s)
        cookies = aiohttp.CookieJar(unsafe=True, quote_cookie=False)  # for this attempt only
        for _ in range(_MAX_REDIRECTS + 1):
            if self._fetch.robots and not for_robots:
                await self._obey_robots_txt(url)
            try:
                result = await self._request(url, deadline, cookies, for_robots)
            except (aiohttp.ClientError, OSError, PrivateAddress, ValueError) as error:
                raise _explain(error, self._fetch.timeout_s) from None
            if isinstance(result, bytes):
                return result
            url = result
        raise FetchError("redirects", f"more than {_MAX_REDIRECTS}")

    async def _request(
        self, url: URL, deadline: _Deadline, cookies: aiohttp.CookieJar, for_robots: bool
    ) -> bytes | URL:
        """Make one request; return the body, or the URL that it redirects to."""
        name = url.host or ""
        if name not in self._fixed and not self._fetch.allow_private:
            check_literal(name)
        host = self._hosts.of(name)
        async with host.slot():
            sent = "; ".join(f"{name}={cookie.coded_value}" for name, cookie in cookies.filter_cookies(url).items())
            headers = {"Cookie": sent} if sent else None
            async with deadline, self._session.get(url, allow_redirects=False, headers=headers) as response:
                cookies.update_cookies(response.cookies, url)
                target = response.headers.get("Location")
                if response.status in _REDIRECTS and target:
                    return _parse(target, base=url)
                if response.status not in (200, 203) and not _is_whole(response):
                    raise self._refused(response, host)
                tags = response.headers.getall("X-Robots-Tag", ()) if self._fetch.robots and not for_robots else ()
                if tag := robots.forbidden_by(tags, self._token):
                    raise FetchError("noai", f"X-Robots-Tag: {tag}")
                limit = _ROBOTS_BYTES if for_robots else self._fetch.max_bytes
                return await _body(response, limit, cut=for_robots)

    def _refused(self, response: aiohttp.ClientResponse, host: Host) -> FetchError:
        """Return the error for a status other than 200. A Retry-After applies to all requests to the host."""
        pause = retry_after(response.headers.get("Retry-After", ""))
        reason, is_retryable = f"http_{response.status}", response.status in _TRANSIENT
        if is_retryable and pause is not None:
            host.pause(pause, reason)
        return FetchError(reason, response.reason or "", is_retryable=is_retryable, pause_s=pause)

    # robots.txt --------------------------------------------------------------------------------------------------

    async def _obey_robots_txt(self, url: URL) -> None:
        """Raise FetchError unless the robots.txt of the URL's origin allows it; also if that cannot be read."""
        origin = str(url.origin())
        rules = self._rules.get(origin)
        if rules is None:
            if origin not in self._requesting:  # all rows of an origin share one request
                self._requesting[origin] = asyncio.create_task(self._learn_rules(origin))
                self._requesting[origin].add_done_callback(lambda _: self._requesting.pop(origin))
            rules = await asyncio.shield(self._requesting[origin])
        if isinstance(rules, FetchError):
            raise FetchError(rules.reason, rules.detail)
        if not rules.allows(url.raw_path_qs):
            raise FetchError("robots", f"robots.txt of {origin}")

    async def _learn_rules(self, origin: str) -> robots.Rules | FetchError:
        rules, last_s = await self._hosts.rules(origin, lambda: self._read_robots_txt(origin))
        self._rules.put(origin, rules, last_s)
        return rules

    async def _read_robots_txt(self, origin: str) -> tuple[robots.Rules | FetchError, float]:
        """Return the rules of an origin, and for how long they hold."""
        rules: robots.Rules | FetchError
        try:
            body = await self._fetch_body(URL(origin) / "robots.txt", for_robots=True)
            rules = robots.parse(body.decode("utf-8", "replace"), self._token)
        except FetchError as why:
            if why.reason in _LOST_BEFORE_RULES:
                rules = FetchError(why.reason, f"robots.txt: {why.detail}")
            elif why.reason == "http_429" or why.reason.startswith("http_5"):
                rules = FetchError("robots", f"robots.txt answered {why.reason}")
            else:  # there is no robots.txt: http_404, empty, endless redirects
                rules = robots.ALL_ALLOWED
        return rules, _FAILURES_LAST_S if isinstance(rules, FetchError) else _RULES_LAST_S


# URLs, bodies, errors ------------------------------------------------------------------------------------------------


def _parse(text: str, base: URL | None = None) -> URL:
    """Return the URL to request, spelled as it is written. Raises FetchError(`bad_url`)."""
    try:
        return as_sent(text, base)
    except (ValueError, TypeError) as error:  # UnicodeError is a ValueError
        origin = "" if base is None else f"redirected from {base} to "
        raise FetchError("bad_url", f"{origin}{text[:200]!r}: {error}") from None


async def _body(response: aiohttp.ClientResponse, limit: int, *, cut: bool) -> bytes:
    """Return the unpacked body. If it has over `limit` bytes it fails, or is `cut` there."""
    stated = response.content_length
    if stated is not None and stated > limit and not cut:
        raise FetchError("too_large_bytes", f"{stated} bytes stated")
    received = bytearray()  # a list would cost 60 bytes for each chunk, and chunks may have one byte
    try:
        async for chunk in response.content.iter_any():
            received += chunk
            if len(received) > limit:
                if not cut:
                    raise FetchError("too_large_bytes", f"more than {limit} bytes")
                break
    except aiohttp.ClientPayloadError as error:
        if response.headers.get("Content-Encoding") or cut:
            raise
        # Chunks without the last, empty one, or a length that is too large: the image tells whether it is whole.
        raise FetchError("truncated", _message(error), is_retryable=True, body=bytes(received)) from None
    data = bytes(received)
    packings = response.headers.get("Content-Encoding", "").lower().replace(",", " ").split()
    if len(packings) > _MOST_PACKINGS:
        raise FetchError("unsupported", f"{len(packings)} Content-Encodings")
    for packing in reversed(packings):
        # In a thread: zlib leaves the event loop to the other rows meanwhile.
        data = await asyncio.to_thread(_unpack, data, packing, limit, cut=cut)
    if not data:
        raise FetchError("empty", "no body")
    return data[:limit] if cut else data


def _is_whole(response: aiohttp.ClientResponse) -> bool:
    """Return whether a response 206 to a request for the whole body has all of it, or does not say what it has."""
    stated = response.headers.get("Content-Range")
    size = re.fullmatch(r"bytes 0-(\d+)/(\d+)", stated.strip()) if stated else None
    return response.status == 206 and (not stated or (size is not None and int(size[1]) + 1 == int(size[2])))


def _unpack(data: bytes, packing: str, limit: int, *, cut: bool) -> bytes:
    """Undo one Content-Encoding (RFC 9110, 8.4.1); never produce more than `limit` bytes."""
    if packing == "identity" or not data:
        return data
    if packing in ("br", "zstd", "compress", "x-compress", "dcb", "dcz"):
        raise FetchError("unsupported", f"Content-Encoding: {packing}")  # was not offered
    if packing not in ("gzip", "x-gzip", "deflate"):
        return data  # not an encoding (UTF-8, binary): browsers take the body as it is
    bare = packing == "deflate" and (data[0] & 0x0F != 8 or int.from_bytes(data[:2], "big") % 31 != 0)
    out = b""
    for _ in range(_MOST_MEMBERS):  # gzip may have several members, one after another
        member = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
        try:
            out += member.decompress(data, limit + 1 - len(out))
        except zlib.error as error:
            if out:  # padding after whole members
                break
            if packing != "deflate" and not data.startswith(b"\x1f\x8b"):
                return data  # plain bytes in spite of the header
            raise FetchError("corrupt", f"Content-Encoding: {packing}: {error}") from None
        if len(out) > limit:
            if cut:
                break
            raise FetchError("too_large_bytes", f"more than {limit} bytes unpacked")
        if not member.eof:
            if cut:
                break
            raise FetchError("truncated", f"Content-Encoding: {packing} ends early", is_retryable=True)
        data = member.unused_data
        if not data:
            break
    else:
        raise FetchError("corrupt", f"Content-Encoding: {packing}: more than {_MOST_MEMBERS} members")
    return out


def _explain(error: Exception, timeout_s: float) -> FetchError:
    """Return an error of aiohttp, the system or the resolver as a FetchError."""
    detail = f"{type(error).__name__}: {error}"
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(error, PrivateAddress):
        return FetchError("private_address", str(error))
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return FetchError("dns", detail, is_retryable=error.os_error.errno == socket.EAI_AGAIN)
    if isinstance(cause, TimeoutError):
        return FetchError("timeout", f"over {timeout_s:g} s", is_retryable=True)
    if isinstance(error, aiohttp.ClientSSLError) or isinstance(cause, ssl.SSLError):
        return FetchError("tls", detail)
    if isinstance(error, aiohttp.ClientPayloadError):
        return FetchError("truncated", _message(error), is_retryable=True)
    if isinstance(error, ValueError):  # also aiohttp.InvalidURL
        return FetchError("bad_url", detail)
    if isinstance(error, aiohttp.ClientResponseError):
        return FetchError("connect", f"no HTTP: {_message(error)}")
    return FetchError("connect", detail, is_retryable=True)


def _message(error: BaseException) -> str:
    """Return what aiohttp found wrong in a response, without the status 400 that aiohttp itself assigns."""
    cause = error.__cause__ if isinstance(error.__cause__, HttpProcessingError) else error
    return " ".join(str(getattr(cause, "message", "") or "the body ends early").split())
