"""HTTP response heads as browsers take them

aiohttp's parser refuses whole responses for a header that nobody reads. Before it sees a head, lines that are not
headers are dropped, control characters are blanked, and repeated equal Content-Length headers become one.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Final

import aiohttp
from aiohttp.client_proto import ResponseHandler

_END: Final = re.compile(rb"\r?\n\r?\n")
_LONGEST: Final = 1 << 18  # bytes; a longer head is left to the parser, which refuses it
_MOST_INTERIM: Final = 8  # responses with a status of 1xx before the one that counts
_STATUS: Final = re.compile(rb"HTTP/\d(?:\.\d)? 1\d\d\b")  # an interim response: another head follows
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\s*:")


class LenientConnector(aiohttp.TCPConnector):
    """A connector whose responses may have faulty heads."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        loop = self._loop
        self._factory = functools.partial(_LenientHandler, loop=loop)  # type: ignore[assignment] # aiohttp has no public way to name a protocol


class _LenientHandler(ResponseHandler):
    _interim = 0
    _head: bytearray | None = None  # what has come of a head; None in a body, and before a request

    def set_response_params(self, **options: Any) -> None:
        self._head, self._interim = bytearray(), 0
        super().set_response_params(**options)

    def data_received(self, data: bytes) -> None:
        ready = b""
        while self._head is not None and data:
            known = len(self._head)
            self._head += data
            end = _END.search(self._head, max(0, known - 3))
            if end is None and len(self._head) < _LONGEST and _may_be_http(self._head):
                data = b""
                break
            stop = end.end() if end else len(self._head)
            head, data = bytes(self._head[:stop]), bytes(self._head[stop:])
            interim = end is not None and _STATUS.match(head) is not None
            self._interim += interim
            if self._interim > _MOST_INTERIM:
                self._refuse_flood()
                return
            self._head = bytearray() if interim else None
            ready += cleaned(head) if end else head
        if ready or data or self._head is None:  # aiohttp itself calls this without data
            super().data_received(ready + data)

    def _refuse_flood(self) -> None:
        self._head = None
        if self.transport is not None:
            self.transport.close()
        self.set_exception(aiohttp.ClientOSError(f"more than {_MOST_INTERIM} interim responses"))

    def eof_received(self) -> None:
        self._flush()
        super().eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._flush()
        super().connection_lost(exc)

    def _flush(self) -> None:
        """Leave a head that was cut off to the parser."""
        if self._head:
            head, self._head = bytes(self._head), None
            super().data_received(head)


def _may_be_http(head: bytearray) -> bool:
    return b"HTTP/".startswith(head[:5])


def cleaned(head: bytes) -> bytes:
    """Return a head, with its empty line, without what a strict parser would refuse.

    >>> cleaned(b"HTTP/1.1 200 OK\\nContent-Length: 2\\nnonsense\\nContent-Length: 2\\n\\n")
    b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n'
    """
    status, *lines = re.split(rb"\r?\n", head.rstrip(b"\r\n"))
    kept: list[bytes] = []
    for line in lines:
        if line[:1] in (b" ", b"\t") and kept:  # a folded line (RFC 9112, 5.2)
            kept[-1] += b" " + _CONTROL.sub(b" ", line.strip())
        elif _NAME.match(line):
            name, _, value = line.partition(b":")
            kept.append(name.rstrip() + b": " + _CONTROL.sub(b" ", value.strip()))
    lengths = [line for line in kept if line.lower().startswith(b"content-length:")]
    if len(lengths) > 1 and len({line.partition(b":")[2].strip() for line in lengths}) == 1:
        kept = [line for line in kept if line not in lengths] + lengths[:1]
    return b"\r\n".join([status, *kept]) + b"\r\n\r\n"
