"""URL as written in a table or a redirect → URL as sent

Signatures depend on the spelling of a URL, so escapes are kept as they are; only characters that cannot be sent are
escaped, as browsers do (https://url.spec.whatwg.org).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import urljoin

from yarl import URL

_IGNORED: Final = re.compile(r"[\t\r\n]")
_PARTS: Final = re.compile(r"(https?)://([^/?#]*)([^?#]*)(\?[^#]*)?", re.IGNORECASE | re.DOTALL)
_LONE_PERCENT: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_IN_PATH: Final = re.compile(rb"[^\x21\x24-\x3b\x3d\x40-\x5d\x5f\x61-\x7a\x7c\x7e%]")  # bytes to escape; \x25 is %
_IN_QUERY: Final = re.compile(rb"[^\x21\x24-\x3b\x3d\x3f-\x7e]")
_NOT_IN_HOST: Final = re.compile(r"[\x00-\x20#%/:<>?@\[\\\]^|\x7f]")  # forbidden domain code points
_DOT: Final = re.compile(r"(?:\.|%2e){1,2}", re.IGNORECASE)


def as_sent(text: str, base: URL | None = None) -> URL:
    """Return the http or https URL to request for `text`; for a redirect, relative to `base`.

    A URL of a table that starts with // is requested by http, which most servers redirect to https. Raises ValueError
    for anything else.

    >>> str(as_sent("http://a.org/x%27y é.jpg?q=%7e&r=a b#part"))
    'http://a.org/x%27y%20%C3%A9.jpg?q=%7e&r=a%20b'
    """
    text = _IGNORED.sub("", text.strip(" \t\r\n\f\v"))
    before, mark, query = text.partition("?")
    text = before.replace("\\", "/") + mark + query
    if base is not None:
        text = urljoin(str(base), text)
    elif text.startswith("//"):
        text = f"http:{text}"
    found = _PARTS.match(text)
    if found is None:
        raise ValueError("not an http or https URL")
    scheme, authority, path, query = found[1].lower(), found[2], found[3] or "/", found[4] or ""
    named = URL(f"{scheme}://{authority}/")  # checks and encodes the host
    if not named.host or named.port == 0:
        raise ValueError("not an http or https URL")
    host = named.raw_host or ""
    if ":" in host:
        ipaddress.IPv6Address(host)
    elif _NOT_IN_HOST.search(host):
        raise ValueError("a character that no host name has")
    target = _escaped(_without_dots(path), _IN_PATH) + _escaped(query, _IN_QUERY)
    return URL(f"{scheme}://{named.raw_authority}{target}", encoded=True)


def _escaped(text: str, illegal: re.Pattern[bytes]) -> str:
    raw = _LONE_PERCENT.sub(b"%25", text.encode("utf-8", "surrogateescape"))  # bytes of a header that are not UTF-8
    return illegal.sub(lambda found: b"%%%02X" % found[0][0], raw).decode("ascii")


def _without_dots(path: str) -> str:
    """Resolve the segments . and .., so that robots.txt is asked for the path that the server will use."""
    if not any(_DOT.fullmatch(segment) for segment in path.split("/")):
        return path
    kept: list[str] = []
    *folders, last = path.split("/")[1:]
    for segment in folders:
        dots = _dots(segment)
        if dots == 2:
            del kept[-1:]
        elif dots == 0:
            kept.append(segment)
    if _dots(last) == 2:
        del kept[-1:]
    return "/" + "".join(f"{segment}/" for segment in kept) + ("" if _dots(last) else last)


def _dots(segment: str) -> int:
    """Return 1 for ".", 2 for "..", also if they are escaped, and 0 for anything else."""
    return len(re.sub("%2e", ".", segment, flags=re.IGNORECASE)) if _DOT.fullmatch(segment) else 0
