"""The viewer's routes: JSON about rows, images by key, the page

All questions run in threads; the explorer answers one at a time and interrupts what takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import webbrowser
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Final

import yaml
from aiohttp import web

from capstan.cluster.view.access import Access
from capstan.cluster.view.answers import (
    KEY,
    READ_ONLY,
    add_static,
    json_answer,
    json_body,
    parsing,
    problems,
    writing,
)
from capstan.cluster.view.captions import Captions
from capstan.cluster.view.duplicates import Duplicates
from capstan.cluster.view.images import Images
from capstan.cluster.view.leased import LeasedTables
from capstan.cluster.view.playing import Playing
from capstan.cluster.view.reviews import Reviews, Takedown, among, count
from capstan.cluster.view.running import RunningWork
from capstan.cluster.view.runs import RunsViewer
from capstan.cluster.view.similar import Similar
from capstan.cluster.view.votes import Votes
from capstan.pipeline.dataset.shards import read_manifest
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.report.explore import Explorer, Judged
from capstan.pipeline.report.query import LONG, Row, Rows
from capstan.pipeline.report.thumbnails import why_missing
from capstan.pipeline.select.review import VERDICTS, Verdict
from capstan.pipeline.storage import Storage
from capstan.recaption.store import list_layers
from capstan.training.monitoring.run_files import find_runs

logger = logging.getLogger(__name__)

_SIDES: Final = (0, 256)  # sizes in which images are served; 0: as stored
_PAGE: Final = 60
_CARD: Final = (  # columns that the grid and the table show
    *("key", "caption", "url", "outcome", "reason", "detail", "width", "height"),
    *("original_width", "original_height", "shard", "unit"),
)
_MOST_BYTES: Final = 1 << 16  # of a request


class Viewer:
    """The application over one open dataset."""

    def __init__(self, rows: Rows, *, read_only: bool = False, options: Sequence[str] = ()) -> None:
        self._show(rows)
        self.tables, self.takedown = LeasedTables(rows.storage), Takedown(rows.storage, options)
        self.reviews, self.captions = Reviews(self.tables), Captions(lambda: self.explorer, self.tables)
        self._reopened = contextlib.ExitStack()
        self._images_ahead: set[asyncio.Task[None]] = set()
        self.access = Access()
        self.app = web.Application(middlewares=[self.access.check, problems], client_max_size=_MOST_BYTES)
        self.app[READ_ONLY] = read_only
        add_static(self.app, "index.html")
        self.app.router.add_get("/api/dataset", self.dataset)
        self.app.router.add_get("/api/rows", self.page)
        self.app.router.add_get("/api/row/{key}", self.row)
        self.app.router.add_get("/api/histogram", self.histogram)
        self.app.router.add_post("/api/funnel", self.funnel)
        self.app.router.add_get("/api/nearest", self.nearest)
        self.app.router.add_get("/image/{key}/{side}", self.image)
        Playing(lambda: self.rows, lambda: self.explorer).add_routes(self.app.router)
        RunningWork(rows.storage, lambda: self.rows, self._reopen).add_routes(self.app.router)
        Similar(lambda: self.explorer, self._cards).add_routes(self.app.router)
        self.app.router.add_get("/api/reviews", self.review_names)
        self.app.router.add_post("/api/review/{name}", self.review)
        self.app.router.add_get("/api/takedown", self.takedown_list)
        self.app.router.add_post("/api/takedown", self.take_down)
        self.captions.add_routes(self.app.router)
        Votes(lambda: self.explorer, self.tables).add_routes(self.app.router)
        Duplicates(lambda: self.explorer, self.tables, self._cards).add_routes(self.app.router)

    def _show(self, rows: Rows) -> None:
        self.rows, self.explorer, self.images = rows, Explorer(rows), Images(rows)
        self._preparing = threading.Thread(target=self.explorer.prepare, name="capstan-index", daemon=True)

    async def _reopen(self) -> None:
        """Show the rows as they are now. Questions about the former ones may still run: they are closed at the end."""
        former, preparing = self.explorer, self._preparing
        rows = await asyncio.to_thread(self._reopened.enter_context, Rows(self.rows.storage))
        await asyncio.to_thread(self._show, rows)
        self._reopened.callback(_end, former, preparing)

    def close(self) -> None:
        """Give back the lease of a table, and end the work on the index."""
        self.tables.close()
        _end(self.explorer, self._preparing)
        self._reopened.close()

    def _prepare(self) -> None:
        """Start to build the index, once: not before the first page is answered, which would wait for a core."""
        if self._preparing.ident is None:
            self._preparing.start()

    def _cards(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return what the grid shows of rows, and read their thumbnails ahead."""
        self._load_ahead(rows)
        return [_card(row) for row in rows]

    def _load_ahead(self, rows: Sequence[Row]) -> None:
        """Start to read thumbnails that the page is going to ask for: each tar is opened once."""
        self.images.remember(rows)
        task = asyncio.get_running_loop().create_task(asyncio.to_thread(self.images.load, rows, 256))
        self._images_ahead.add(task)
        task.add_done_callback(self._images_ahead.discard)

    async def dataset(self, _: web.Request) -> web.Response:
        """Return what does not change while the page is open: counts, funnel, conditions, columns, subjects, layers."""
        rows, explorer = self.rows, self.explorer
        manifest = rows.manifest
        recipe = manifest.recipe if manifest else {}
        layers = await asyncio.to_thread(list_layers, rows.storage)
        outcomes = await asyncio.to_thread(lambda: explorer.outcomes)
        return json_answer(
            {
                "dataset": rows.storage.url,
                "finished": rows.finished,
                "rows": rows.count,
                "preparing": explorer.preparing,
                "outcomes": [{"outcome": o, "reason": r, "rows": n} for (o, r), n in outcomes.items()],
                "funnel": manifest.funnel if manifest else [],
                "conditions": [{"name": name, "where": where} for name, where in rows.conditions.items()],
                "columns": explorer.columns,
                "subjects": [
                    {"title": s.title, "sql": s.sql, "thresholds": [asdict(t) for t in s.thresholds]}
                    for s in explorer.subjects
                ],
                "layers": layers,
                "embeddings": bool(((recipe.get("score") or {}).get("clip") or {}).get("embeddings")),
                "read_only": self.app[READ_ONLY],
            }
        )

    async def page(self, request: web.Request) -> web.Response:
        """Return a page of rows, and read their thumbnails ahead. `look=grid` needs no text but captions."""
        asked = request.query
        with parsing():
            after = json.loads(asked["after"]) if "after" in asked else None
        if after is not None and not (isinstance(after, list) and len(after) == 2 and isinstance(after[1], str)):
            raise RecipeError("after", "is not the end of a page", "use the `next` of the page before")
        review = await asyncio.to_thread(self.reviews.read, asked["review"]) if asked.get("review") else None
        wanted = asked.get("verdict", "")
        judged = Judged(review, wanted.replace("none", "")) if review is not None and wanted else None
        found = await asyncio.to_thread(
            self.explorer.page,
            asked.get("where", ""),
            asked.get("outcome", ""),
            asked.get("reason", ""),
            asked.get("order", "key"),
            asked.get("descending") == "1",
            after,
            _PAGE,
            judged,
            ("caption",) if asked.get("look") == "grid" else LONG,
        )
        self._load_ahead(found.rows)
        self._prepare()
        given = among(review, [row.key for row in found.rows]) if review is not None else {}
        cards = [_card(row) | asdict(given.get(row.key, Verdict(""))) for row in found.rows]
        return json_answer(
            {"rows": cards, "next": found.next, "total": found.total, "low": found.low, "high": found.high}
        )

    async def row(self, request: web.Request) -> web.Response:
        """Return all that is known of a row, with its captions in every layer."""
        key = _key(request)
        detail = await asyncio.to_thread(self.explorer.detail, key)
        row = await asyncio.to_thread(self.explorer.row, key)
        if detail is None or row is None:
            raise web.HTTPNotFound(text="no such row")
        captions = await asyncio.to_thread(self.captions.of, row)
        name = request.query.get("review")
        given = among(await asyncio.to_thread(self.reviews.read, name), [key]) if name else {}
        card = _card(row) | asdict(given.get(key, Verdict("")))
        return json_answer({**detail, "card": card, "captions": captions})

    async def histogram(self, request: web.Request) -> web.Response:
        """Return the histogram of a subject."""
        found = await asyncio.to_thread(self.explorer.histogram, request.query.get("subject", ""))
        return json_answer(
            None
            if found is None
            else {"edges": found.edges, "kept": found.kept, "others": found.lost, "whole": found.whole}
        )

    async def funnel(self, request: web.Request) -> web.Response:
        """Return what conditions would leave, and the conditions as YAML for a recipe."""
        asked = await json_body(request)
        with parsing():
            conditions = [(str(one["name"]), str(one["where"])) for one in asked["conditions"]]
        steps = await asyncio.to_thread(self.explorer.funnel, conditions)
        select = [{"name": name, "where": where} for name, where in conditions]
        text = yaml.safe_dump({"select": select}, sort_keys=False, allow_unicode=True, width=100)
        return json_answer({"steps": steps, "yaml": text})

    async def nearest(self, request: web.Request) -> web.Response:
        """Return the rows on both sides of a threshold."""
        try:
            threshold = float(request.query.get("threshold", ""))
        except ValueError:
            raise RecipeError("threshold", "is not a number", "write e.g. threshold=0.28") from None
        found = await asyncio.to_thread(self.explorer.nearest, request.query.get("subject", ""), threshold)
        self._load_ahead([row for side in found.values() for row in side])
        return json_answer({side: [_card(row) for row in rows] for side, rows in found.items()})

    async def image(self, request: web.Request) -> web.Response:
        """Return a row's JPEG. Removed rows have none."""
        key, side = _key(request), request.match_info["side"]
        if side not in map(str, _SIDES):
            raise web.HTTPNotFound(text="no such size")
        row = self.images.remembered(key) or await asyncio.to_thread(self.explorer.row, key)
        data = await asyncio.to_thread(self.images.get, row, int(side)) if row is not None and row.is_shown else None
        if data is None:
            raise web.HTTPNotFound(text="no image")
        return web.Response(body=data, content_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    async def review_names(self, _: web.Request) -> web.Response:
        """Return the reviews with their numbers of verdicts."""
        return json_answer({"reviews": await asyncio.to_thread(self.reviews.counts), "who": self.reviews.who})

    async def review(self, request: web.Request) -> web.Response:
        """Publish verdicts; return those before, with which the page can undo them."""
        asked = await writing(request)
        with parsing():
            listed = asked["verdicts"]
            given = {str(one["key"]): Verdict(str(one["verdict"]), str(one.get("note", ""))) for one in listed}
        if any(one.verdict not in ("", *VERDICTS) for one in given.values()):
            raise RecipeError("verdict", "is unknown", f"use {', '.join(VERDICTS)} or an empty text")
        await self._known(given)
        before, table = await asyncio.to_thread(self.reviews.give, request.match_info["name"], given)
        undo = [{"key": key, **asdict(one)} for key, one in before.items()]
        return json_answer({"before": undo, **count(table)})

    async def takedown_list(self, _: web.Request) -> web.Response:
        """Return the keys to take down, their file and the command that does it."""
        return json_answer(await asyncio.to_thread(self.takedown.change))

    async def take_down(self, request: web.Request) -> web.Response:
        """Add keys to the takedown list, or take them out of it. Nothing is removed from the dataset."""
        asked = await writing(request)
        with parsing():
            add, remove = [[str(key) for key in asked.get(name, [])] for name in ("add", "remove")]
        await self._known(add)
        return json_answer(await asyncio.to_thread(self.takedown.change, add, remove))

    async def _known(self, keys: Iterable[str]) -> None:
        """Raise RecipeError unless all keys are rows of the dataset."""
        wanted = set(keys)
        known = await asyncio.to_thread(self.explorer.rows_of, filter(KEY.fullmatch, wanted))
        if len(known) < len(wanted):
            raise RecipeError("key", "is not of a row of this dataset", "reload the page")


def _end(explorer: Explorer, preparing: threading.Thread) -> None:
    explorer.close()
    if preparing.ident is not None:
        preparing.join()


def _key(request: web.Request) -> str:
    key = request.match_info["key"]
    if not KEY.fullmatch(key):
        raise web.HTTPNotFound(text="no such row")
    return key


def _card(row: Row) -> dict[str, Any]:
    """Return what the grid and the table show of a row."""
    return {name: getattr(row, name) for name in _CARD} | {"image": row.is_shown, "why": why_missing(row)}


async def serve(
    storage: Storage,
    port: int,
    *,
    browser: bool,
    ready: Callable[[str], None],
    read_only: bool = False,
    options: Sequence[str] = (),
) -> None:
    """Serve the viewer on loopback until it is cancelled; call `ready` with the address once it listens.

    Raises RecipeError if there is neither a dataset nor a training run at `storage`.
    """
    with contextlib.ExitStack() as stack:
        runs = await asyncio.to_thread(find_runs, storage)
        if runs and read_manifest(storage) is None:
            viewer: Viewer | RunsViewer = RunsViewer(storage, runs)
        else:
            viewer = Viewer(stack.enter_context(Rows(storage)), read_only=read_only, options=options)
        runner = web.AppRunner(viewer.app, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port)
            try:
                await site.start()
            except OSError as error:
                raise RecipeError("--port", f"cannot listen on {port} ({error.strerror})", "use a free port") from None
            address = viewer.access.serve_on(runner.addresses[0][1])
            ready(address)
            if browser:
                with contextlib.suppress(webbrowser.Error):
                    webbrowser.open(address)
            await asyncio.Event().wait()
        finally:
            viewer.close()
            await runner.cleanup()
