"""The viewer of training runs: a table of runs, their curves and sample grids, live while they train"""

from __future__ import annotations

import asyncio
import re
import threading
from typing import Any, Final

from aiohttp import web

from capstan.cluster.view.access import Access
from capstan.cluster.view.answers import add_static, json_answer, problems
from capstan.pipeline.config import fingerprint
from capstan.pipeline.errors import DamagedFile, StorageError
from capstan.pipeline.storage import Storage
from capstan.training.monitoring.run_files import RunFiles, find_runs

_ID: Final = re.compile(r"[0-9a-f]{16}")


class RunsViewer:
    """The application over the runs at or below a folder."""

    def __init__(self, storage: Storage, runs: list[RunFiles]) -> None:
        self._storage = storage
        self._runs = {_id(run): run for run in runs}
        self._lock = threading.Lock()
        self.access = Access()
        self.app = web.Application(middlewares=[self.access.check, problems])
        add_static(self.app, "runs.html")
        self.app.router.add_get("/api/runs", self.runs)
        self.app.router.add_get("/api/run/{id}", self.run)
        self.app.router.add_get("/grid/{id}/{step}", self.grid)

    def close(self) -> None:
        """Do nothing: the viewer of runs writes nothing."""

    async def runs(self, _: web.Request) -> web.Response:
        """Return the table of runs as they are now; runs that have been started since are found."""
        return json_answer({"folder": self._storage.url, "runs": await asyncio.to_thread(self._table)})

    def _table(self) -> list[dict[str, Any]]:
        with self._lock:
            for run in find_runs(self._storage, known=[run.name for run in self._runs.values()]):
                self._runs[_id(run)] = run
            for run in self._runs.values():
                run.refresh()
            return [_summary(run) for run in self._runs.values()]

    async def run(self, request: web.Request) -> web.Response:
        """Return a run's curves."""
        run = self._wanted(request)
        return json_answer({"id": _id(run), "series": await asyncio.to_thread(self._series, run)})

    def _series(self, run: RunFiles) -> dict[str, Any]:
        with self._lock:
            return run.series()

    async def grid(self, request: web.Request) -> web.Response:
        """Return the PNG of the samples after a step."""
        run, step = self._wanted(request), request.match_info["step"]
        name = run.grids.get(int(step)) if step.isdecimal() and len(step) <= 12 else None
        if name is None:
            raise web.HTTPNotFound(text="no samples after this step")
        try:
            data = await asyncio.to_thread(run.storage.read, name)
        except (FileNotFoundError, StorageError, DamagedFile):
            raise web.HTTPNotFound(text="no samples after this step") from None
        return web.Response(body=data, content_type="image/png", headers={"Cache-Control": "private, max-age=60"})

    def _wanted(self, request: web.Request) -> RunFiles:
        run = self._runs.get(request.match_info["id"]) if _ID.fullmatch(request.match_info["id"]) else None
        if run is None:
            raise web.HTTPNotFound(text="no such run")
        return run


def _id(run: RunFiles) -> str:
    return fingerprint(run.name)


def _summary(run: RunFiles) -> dict[str, Any]:
    """Return a row of the table."""
    return {
        "id": _id(run),
        "name": run.name,
        "model": str(run.train.get("model", "")),
        "state": run.state,
        "step": run.step,
        "steps": run.steps,
        "loss": run.last_of("loss"),
        "images_per_s": run.last_of("images_per_s"),
        "mfu": run.last_of("mfu"),
        "seconds": run.seconds(),
        "evaluation": run.measures(),
        "grids": sorted(run.grids),
        "checkpoints": run.checkpoints,
        "prompts": run.prompts,
        "unreadable": run.unreadable,
    }
