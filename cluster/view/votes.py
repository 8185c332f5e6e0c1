"""The viewer's routes about blind votes: two captions of an image, without their layers"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import web

from capstan.cluster.view.answers import json_answer, known_row, parsing, writing
from capstan.cluster.view.leased import Kept, LeasedTables
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.report.explore import Explorer
from capstan.recaption.compare import votes
from capstan.recaption.compare.votes import Ballot, Sides


class Votes:
    """The votes of one dataset, and what is voted on next."""

    def __init__(self, explorer: Callable[[], Explorer], tables: LeasedTables) -> None:
        self._explorer, self._tables, self._storage = explorer, tables, tables.storage
        self._lock = threading.Lock()
        self._left: dict[Sides, Iterator[Ballot]] = {}  # of each pair, what was not shown yet
        self._kept = Kept(
            "votes",
            lambda: votes.read_votes(self._storage),
            lambda table: votes.write_votes(self._storage, table),
        )

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add its routes."""
        router.add_get("/api/votes", self.overview)
        router.add_get("/api/ballot", self.ballot)
        router.add_post("/api/vote", self.vote)

    async def overview(self, _: web.Request) -> web.Response:
        """Return the sides that can be compared, and the results of all pairs."""
        return json_answer(await asyncio.to_thread(self._overview))

    def _overview(self) -> dict[str, Any]:
        return {
            "sides": votes.sides_of(self._storage),
            "results": votes.results(self._tables.read(self._kept)),
        }

    async def ballot(self, request: web.Request) -> web.Response:
        """Return the next image to vote on, or null: its key and two captions, and the number of votes so far."""
        sides = await self._sides(request.query)
        found, count = await asyncio.to_thread(self._next, sides, request.query.get("again") == "1")
        shown = None if found is None else {"key": found.key, "left": found.left, "right": found.right}
        return json_answer({"ballot": shown, "votes": count})

    def _next(self, sides: Sides, again: bool) -> tuple[Ballot | None, int]:
        """Return the next image without a vote, and the number of votes; `again` starts from the first one."""
        with self._lock:
            done = votes.voted(self._tables.read(self._kept), sides)
            if again or sides not in self._left:
                self._left[sides] = votes.ballots(Dataset(self._storage), sides)
            return next((one for one in self._left[sides] if one.key not in done), None), len(done)

    async def vote(self, request: web.Request) -> web.Response:
        """Publish a vote, or take it back; return the number of votes on the pair."""
        asked = await writing(request)
        sides = await self._sides(asked)
        with parsing():
            key, choice = str(asked["key"]), str(asked["choice"])
        row = await known_row(self._explorer(), key)
        winner = votes.winner_of(sides, row.key, choice)
        who = self._tables.who
        _, after = await asyncio.to_thread(
            self._tables.change, self._kept, lambda table: votes.changed(table, sides, row.key, winner, who)
        )
        return json_answer({"votes": len(votes.voted(after, sides))})

    async def _sides(self, asked: Any) -> Sides:
        with parsing():
            one, other = str(asked["a"]), str(asked["b"])
        return await asyncio.to_thread(votes.check_sides, self._storage, one, other)
