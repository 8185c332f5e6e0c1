"""What all pages of the viewer share: static files, JSON, and mistakes as JSON"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.report.explore import Explorer
from capstan.pipeline.report.query import Row
from capstan.pipeline.storage.local import disk_errors

READ_ONLY: Final = web.AppKey("read_only", bool)  # whether nothing may be written
KEY: Final = re.compile(r"[0-9a-f]{32}")
_STATIC: Final = Path(__file__).with_name("static")
_TYPES: Final = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def add_static(app: web.Application, page: str) -> None:
    """Serve the files of static/, and one of its pages as /."""
    app.router.add_get("/", _file(page))
    for path in sorted(_STATIC.iterdir()):
        app.router.add_get(f"/static/{path.name}", _file(path.name))


def _file(name: str) -> Callable[[web.Request], Any]:
    async def answer(_: web.Request) -> web.Response:
        path = _STATIC / name
        return web.Response(body=path.read_bytes(), content_type=_TYPES[path.suffix], charset="utf-8")

    return answer


@web.middleware
async def problems(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    """Return a user's mistake as JSON with its field, problem and hint."""
    try:
        with disk_errors():
            answer: web.StreamResponse = await handler(request)
        return answer
    except RecipeError as error:
        return web.json_response({"field": error.field, "problem": error.problem, "hint": error.hint}, status=400)
    except CapstanError as error:
        return web.Response(status=409, text=str(error))


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """Raise RecipeError for a request that lacks a field, or has another type in it.

    It is for the lines that take a request apart. An error of these kinds elsewhere is a defect: it is logged, and
    answered with status 500.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RecipeError("request", "cannot be read", "reload the page") from None


async def writing(request: web.Request) -> dict[str, Any]:
    """Return the body of a request that writes. Raises 403 if the viewer may only read."""
    if request.app[READ_ONLY]:
        raise web.HTTPForbidden(text="This viewer was started with --read-only.")
    return await json_body(request)


async def json_body(request: web.Request) -> dict[str, Any]:
    """Return the JSON object that a request holds. Raises RecipeError if it holds none."""
    with parsing():
        body = await request.json()
        if not isinstance(body, dict):
            raise TypeError
    return body


async def known_row(explorer: Explorer, key: str) -> Row:
    """Return the row of a key. Raises RecipeError if the dataset has none."""
    row = await asyncio.to_thread(explorer.row, key) if KEY.fullmatch(key) else None
    if row is None:
        raise RecipeError("key", "is not of a row of this dataset", "reload the page")
    return row


def json_answer(answer: Any) -> web.Response:
    """Return a JSON answer that no cache keeps."""
    return web.json_response(answer, headers={"Cache-Control": "no-store"})
