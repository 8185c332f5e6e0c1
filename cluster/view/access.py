"""Who may ask the viewer: loopback, a token, no foreign pages

The page's address holds a random token once; it becomes a cookie that scripts cannot read and other sites do not send.
The Host and Origin headers are compared, since a hostile page can point a name of its own at this machine (DNS
rebinding), and requests that write need a header that a form of another site cannot set.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

COOKIE: Final = "capstan-view"
HEADER: Final = "X-Capstan"
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_SAFE: Final = ("GET", "HEAD")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Access:
    """The token of one viewer, and the middleware that checks every request."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(24)
        self._hosts: set[str] = set()

    def serve_on(self, port: int) -> str:
        """Accept requests to this port only; return the address to open."""
        self._hosts = {f"{host}:{port}" for host in ("127.0.0.1", "localhost")}
        return f"http://127.0.0.1:{port}/?token={self.token}"

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse what does not come from the page itself, and add the security headers to every answer."""
        answer: web.StreamResponse | None = self._refusal(request) or self._entrance(request)
        if answer is None:
            try:
                answer = await handler(request)
            except web.HTTPException as error:
                error.headers.update(_HEADERS)
                raise
        answer.headers.update(_HEADERS)
        return answer

    def _refusal(self, request: web.Request) -> web.Response | None:
        if request.headers.get("Host", "") not in self._hosts:
            return web.Response(status=403, text="This name does not belong to the viewer.")
        origin = request.headers.get("Origin")
        if origin is not None and origin.removeprefix("http://") not in self._hosts:
            return web.Response(status=403, text="Another page may not ask the viewer.")
        if request.method not in _SAFE and request.headers.get(HEADER) != "1":
            return web.Response(status=403, text=f"The header {HEADER} is missing.")
        return None

    def _entrance(self, request: web.Request) -> web.Response | None:
        """Turn the token of the address into a cookie; refuse a request without either."""
        given = request.query.get("token")
        if given is not None and request.path == "/" and hmac.compare_digest(given.encode(), self.token.encode()):
            answer = web.Response(status=302, headers={"Location": "/"})
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="Strict", path="/")
            return answer
        if not hmac.compare_digest(request.cookies.get(COOKIE, "").encode(), self.token.encode()):
            return web.Response(status=401, text="Open the address that `capstan view` printed.")
        return None
