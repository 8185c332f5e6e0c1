"""The viewer's routes for rows like an image or a text; embeddings are read at the first question, in the background"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from aiohttp import web

from capstan.cluster.view.answers import json_answer
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.report.explore import Explorer
from capstan.pipeline.report.query import Row
from capstan.pipeline.similar import vectors
from capstan.pipeline.similar.nearest import Nearest
from capstan.pipeline.similar.text import TextEncoder

log = logging.getLogger(__name__)

_COUNT: Final = 60
_MORE: Final = 20  # found in addition, in place of rows that may not be shown
_LONGEST: Final = 1000  # characters of a text
_AT_ONCE_S: Final = 2.0  # how long a question waits for the embeddings
_KEY: Final = re.compile(r"[0-9a-f]{32}")


class Similar:
    """Rows like an image or a text. `explorer` returns the rows as they are shown now; `show` is told what is found."""

    def __init__(self, explorer: Callable[[], Explorer], show: Callable[[Sequence[Row]], list[dict[str, Any]]]) -> None:
        self._explorer, self._show = explorer, show
        self._lock = threading.Lock()
        self._of: Explorer | None = None  # whose rows the embeddings below are
        self._work: _Work | None = None

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add its routes."""
        router.add_get("/api/similar", self.similar)

    async def similar(self, request: web.Request) -> web.Response:
        """Return the rows most like the image of `key` or like `text`, or how far their embeddings are read."""
        key, text = request.query.get("key", ""), request.query.get("text", "").strip()
        if bool(key) == bool(text) or (key and not _KEY.fullmatch(key)) or len(text) > _LONGEST:
            raise RecipeError("similar", "needs the key of a row, or a text", "click an image, or write a few words")
        work = await asyncio.to_thread(self._current)
        if not await asyncio.to_thread(work.ready.wait, _AT_ONCE_S):
            return json_answer({"preparing": work.share})
        if work.error is not None:
            raise work.error
        found = await asyncio.to_thread(self._find, work, key, text)
        rows = [row for row, _ in found]
        cards = [card | {"cosine": cosine} for card, (_, cosine) in zip(self._show(rows), found, strict=True)]
        return json_answer({"rows": cards, "exact": work.nearest.exact, "among": len(work.nearest.vectors.rows)})

    def _current(self) -> _Work:
        """Return the embeddings of the rows that are shown; start to read them if nobody asked yet."""
        with self._lock:
            explorer = self._explorer()
            if self._work is None or self._of is not explorer or self._work.error is not None:
                self._of, self._work = explorer, _Work(explorer)
            return self._work

    def _find(self, work: _Work, key: str, text: str) -> list[tuple[Row, float]]:
        explorer, held = self._explorer(), work.nearest.vectors
        if key:
            row = explorer.row(key)
            place = held.row(key, row.unit) if row is not None else None
            query = None if place is None else np.asarray(held.rows[place], np.float32)
            if query is None or not query.any():
                raise RecipeError("key", "has no embedding", "choose a row with an image that was scored")
        else:
            query = work.encoder.encode(text)
        found = work.nearest.find(query, _COUNT + _MORE)
        units = {held.unit(row) for row, _ in found}
        rows = explorer.rows_of([held.key(row) for row, _ in found], units)
        pairs = [(rows.get(held.key(row)), cosine) for row, cosine in found]
        return [(row, cosine) for row, cosine in pairs if row is not None and row.is_shown and row.key != key][:_COUNT]


class _Work:
    """The embeddings of one dataset while they are read, and then."""

    nearest: Nearest
    encoder: TextEncoder

    def __init__(self, explorer: Explorer) -> None:
        self.share, self.error = 0.0, None
        self.ready = threading.Event()
        threading.Thread(target=self._read, args=(explorer,), name="capstan-vectors", daemon=True).start()

    error: CapstanError | None

    def _read(self, explorer: Explorer) -> None:
        def half(share: float) -> None:
            self.share = share / 2

        def rest(share: float) -> None:
            self.share = 0.5 + share / 2

        try:
            rows = explorer.rows
            source = vectors.find(rows.storage)
            self.nearest = Nearest(vectors.load(rows.storage, source, said=half))
            self.nearest.prepare(rest)
            recipe = rows.manifest.recipe if rows.manifest else {}
            self.encoder = TextEncoder((recipe.get("score") or {}).get("clip") or {}, source.model)
        except CapstanError as error:
            self.error = error
        except Exception as error:  # the thread's boundary: whoever waits for it gets the error
            log.exception("the embeddings cannot be read")
            self.error = CapstanError(f"the embeddings cannot be read: {error}")
        finally:
            self.ready.set()
