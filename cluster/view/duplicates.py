"""The viewer's routes about duplicates: groups with their distances, and verdicts on pairs"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from aiohttp import web

from capstan.cluster.view.answers import KEY, json_answer, parsing, writing
from capstan.cluster.view.leased import Kept, LeasedTables
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.report import duplicates
from capstan.pipeline.report.duplicates import Chosen, Group
from capstan.pipeline.report.explore import Explorer
from capstan.pipeline.report.query import Row
from capstan.pipeline.select import pairs
from capstan.pipeline.select.near_duplicates import REASONS, SEMANTIC
from capstan.pipeline.similar.vectors import cosines


class Duplicates:
    """The duplicates of one dataset; `cards` returns what the page shows of rows."""

    def __init__(
        self,
        explorer: Callable[[], Explorer],
        tables: LeasedTables,
        cards: Callable[[Sequence[Row]], list[dict[str, Any]]],
    ) -> None:
        self._explorer, self._tables, self._cards = explorer, tables, cards
        self._kept = Kept(
            "pairs", lambda: pairs.read_pairs(tables.storage), lambda table: pairs.write_pairs(tables.storage, table)
        )
        self._undone: list[dict[pairs.Pair, str]] = []  # the verdicts before each change, newest last

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add its routes."""
        router.add_get("/api/duplicates", self.groups)
        router.add_get("/api/duplicates/counts", self.counts)
        router.add_post("/api/duplicates", self.judge)
        router.add_post("/api/duplicates/undo", self.undo)

    async def counts(self, request: web.Request) -> web.Response:
        """Return the number of pairs by reason and distance, and of verdicts."""
        chosen = Chosen.of(request.query)
        judged = await asyncio.to_thread(self._tables.read, self._kept)
        found = await asyncio.to_thread(duplicates.counts, self._explorer(), judged, chosen.verdict)
        return json_answer({"counts": found, **self._totals(judged)})

    async def groups(self, request: web.Request) -> web.Response:
        """Return a page of groups: a kept row and the rows that repeat it."""
        chosen, after = Chosen.of(request.query), request.query.get("after", "")
        explorer, judged = self._explorer(), await asyncio.to_thread(self._tables.read, self._kept)
        if chosen.verdict == pairs.DIFFERENT:
            found, more = await asyncio.to_thread(duplicates.remembered, explorer, judged, after)
        else:
            found, more = await asyncio.to_thread(duplicates.groups, explorer, judged, chosen, after)
        keys = {key for group in found for key in (group.kept, *(one.key for one in group.members))}
        rows = await asyncio.to_thread(explorer.rows_of, keys)
        cards = {card["key"]: card for card in self._cards(list(rows.values()))}
        near = await asyncio.to_thread(self._cosines, found, rows)
        shown = [_shown(group, cards, near) for group in found if group.kept in cards]
        return json_answer({"groups": shown, "next": more})

    def _cosines(self, groups: Sequence[Group], rows: Mapping[str, Row]) -> dict[pairs.Pair, float]:
        """Return the cosines of the pairs that embeddings found."""
        found = [(group.kept, one.key) for group in groups for one in group.members if one.reason == REASONS[SEMANTIC]]
        return cosines(self._tables.storage, found, {key: row.unit for key, row in rows.items()}) if found else {}

    async def judge(self, request: web.Request) -> web.Response:
        """Publish a verdict on pairs: those listed, or all that the page has chosen. Return how many."""
        asked = await writing(request)
        with parsing():
            verdict = str(asked["verdict"])
        if verdict not in ("", *pairs.VERDICTS):
            raise RecipeError("verdict", f"{verdict!r} is unknown", f"use {', '.join(pairs.VERDICTS)} or an empty text")
        if "chosen" in asked:
            judged = await asyncio.to_thread(self._tables.read, self._kept)
            with parsing():
                chosen = Chosen.of(asked["chosen"])
            find = functools.partial(duplicates.all_pairs, among_copies=verdict != pairs.SAME)
            wanted = await asyncio.to_thread(find, self._explorer(), judged, chosen)
        else:
            with parsing():
                wanted = [pairs.pair(str(one), str(other)) for one, other in asked["pairs"]]
            await self._known({key for both in wanted for key in both}, wanted)
        before, after = await self._publish(dict.fromkeys(wanted, verdict))
        self._undone.append(before)
        return json_answer({"pairs": len(wanted), **self._totals(after)})

    async def undo(self, request: web.Request) -> web.Response:
        """Take the last change back; return how many pairs it was about, 0 if there is none."""
        await writing(request)
        before = self._undone.pop() if self._undone else {}
        _, after = await self._publish(before)
        return json_answer({"pairs": len(before), **self._totals(after)})

    async def _publish(self, verdicts: Mapping[pairs.Pair, str]) -> tuple[dict[pairs.Pair, str], pa.Table]:
        """Publish verdicts; return those before, and all."""
        who = self._tables.who
        change = self._tables.change
        table, after = await asyncio.to_thread(change, self._kept, lambda table: pairs.changed(table, verdicts, who))
        known = pairs.among(table, sorted({key for both in verdicts for key in both}))
        return {both: known.get(both, "") for both in verdicts}, after

    async def _known(self, keys: set[str], wanted: Sequence[pairs.Pair]) -> None:
        known = await asyncio.to_thread(self._explorer().rows_of, filter(KEY.fullmatch, keys))
        if len(known) < len(keys) or any(one == other for one, other in wanted):
            raise RecipeError("key", "is not of a row of this dataset", "reload the page")

    def _totals(self, judged: pa.Table) -> dict[str, Any]:
        number = {one: int(pc.sum(pc.equal(judged["verdict"], one)).as_py() or 0) for one in pairs.VERDICTS}
        return {"judged": number, "undo": len(self._undone)}


def _shown(group: Group, cards: Mapping[str, Mapping[str, Any]], near: Mapping[pairs.Pair, float]) -> dict[str, Any]:
    members = [
        {**vars(one), "card": cards[one.key], "cosine": near.get((group.kept, one.key))}
        for one in group.members
        if one.key in cards
    ]
    return {"kept": cards[group.kept], "members": members, "more": group.more}
