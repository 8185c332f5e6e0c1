"""The viewer's routes about running work: progress of a build or a caption job, and the rows that came since"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from capstan.cluster.jobs.store import records
from capstan.cluster.view.answers import json_answer
from capstan.pipeline.report.query import Rows
from capstan.pipeline.report.running import Running
from capstan.pipeline.storage import Storage


class RunningWork:
    """What is being done to the dataset that `rows()` shows; `reopen` shows its rows as they are now."""

    def __init__(self, storage: Storage, rows: Callable[[], Rows], reopen: Callable[[], Awaitable[None]]) -> None:
        self._storage, self._rows, self._reopen = storage, rows, reopen
        self._running, self._lock = Running(storage), threading.Lock()

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add its routes."""
        router.add_get("/api/running", self.running)
        router.add_post("/api/reopen", self.reopen)

    async def running(self, _: web.Request) -> web.Response:
        """Return the progress, and whether there are other rows than those shown."""
        return json_answer(await asyncio.to_thread(self._look))

    def _look(self) -> dict[str, Any]:
        with self._lock:
            found = self._running.look()
        rows = self._rows()
        more = not found["finished"] and found["staged"]["rows"] != rows.count
        changed = more or self._running.manifest != rows.manifest
        return found | {"changed": changed, "jobs": _jobs(self._storage.url)}

    async def reopen(self, _: web.Request) -> web.Response:
        """Show the rows as they are now. Nothing is written."""
        await self._reopen()
        return json_answer({"rows": self._rows().count})


def _jobs(dataset: str) -> list[dict[str, Any]]:
    """Return the submitted jobs over this dataset that have not been seen to end."""
    return [
        {"id": job.id, "target": job.target, "command": " ".join(job.arguments)}
        for job in records()
        if job.ended is None and job.dataset.rstrip("/") == dataset.rstrip("/")
    ]
