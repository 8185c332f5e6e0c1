"""The viewer's route for the files of a clip: its video and its sound, also by byte ranges, as browsers ask for them"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from aiohttp import web

from capstan.pipeline.dataset.parts import PARTS
from capstan.pipeline.report.explore import Explorer
from capstan.pipeline.report.query import Rows
from capstan.pipeline.report.thumbnails import find_parts

_TYPES: Final = {"mp4": "video/mp4", "flac": "audio/flac"}


class Playing:
    """Serves /part/KEY/mp4 and /part/KEY/flac of rows that may be shown."""

    def __init__(self, rows: Callable[[], Rows], explorer: Callable[[], Explorer]) -> None:
        self._rows, self._explorer = rows, explorer

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get(r"/part/{key:[0-9a-f]{32}}/{part}", self.part)

    async def part(self, request: web.Request) -> web.Response:
        """Return a file of a clip, or the requested bytes of it."""
        part = request.match_info["part"]
        if part not in PARTS:
            raise web.HTTPNotFound(text="no such part")
        data = await asyncio.to_thread(self._find, request.match_info["key"], part)
        if data is None:
            raise web.HTTPNotFound(text="no such part")
        headers = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=3600"}
        try:
            start, stop, _ = request.http_range.indices(len(data))
        except ValueError:
            start, stop = len(data), 0
        if "Range" not in request.headers:
            return web.Response(body=data, content_type=_TYPES[part], headers=headers)
        if start >= stop:
            raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return web.Response(status=206, body=data[start:stop], content_type=_TYPES[part], headers=headers)

    def _find(self, key: str, part: str) -> bytes | None:
        row = self._explorer().row(key)
        return find_parts(self._rows(), [row]).get(key, {}).get(part) if row is not None else None
