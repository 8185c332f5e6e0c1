"""A row → its captions in every layer, and edits of them: a layer over the edited one"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from aiohttp import web

from capstan.cluster.view.answers import json_answer, known_row, parsing, writing
from capstan.cluster.view.leased import Kept, LeasedTables
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.report.explore import Explorer
from capstan.pipeline.report.query import Row
from capstan.pipeline.storage import Storage
from capstan.recaption import edits, store

_SHOWN: Final = ["slot", "text", "raw", "finish", "flags", "discarded"]


class Captions:
    """The captions of one dataset, as the browser shows and edits them."""

    def __init__(self, explorer: Callable[[], Explorer], tables: LeasedTables) -> None:
        self._explorer, self._tables, self._storage = explorer, tables, tables.storage

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add the route that edits."""
        router.add_post("/api/edit", self.edit)

    def of(self, row: Row) -> list[dict[str, Any]]:
        """Return what each layer says of a row's image, the oldest layer first (`captions_of`)."""
        return captions_of(self._storage, row.shard, row.key) if row.shard and row.is_shown else []

    async def edit(self, request: web.Request) -> web.Response:
        """Publish another text of an image, layer and slot, or take it back; return the one before, and all."""
        asked = await writing(request)
        with parsing():
            layer, slot, text, key = str(asked["layer"]), str(asked["slot"]), asked["text"], str(asked["key"])
        if text is not None and not isinstance(text, str):
            raise RecipeError("text", "is not a text", "reload the page")
        row = await known_row(self._explorer(), key)
        before = await asyncio.to_thread(self._publish, row, layer, slot, text)
        return json_answer({"before": before, "captions": await asyncio.to_thread(self.of, row)})

    def _publish(self, row: Row, layer: str, slot: str, text: str | None) -> str | None:
        slots = store.layer_recipe(self._storage, layer)["slots"]
        if slot not in slots:
            raise RecipeError("slot", f"layer {layer} has no slot {slot!r}", f"use one of {', '.join(slots)}")
        if not row.shard or not row.is_shown:
            raise RecipeError("key", "is not of a kept row", "edit captions of kept rows")
        place = store.Place(row.key, _image(self._storage, row.shard, row.key)["sha256"][0].as_py(), "", slot)
        kept = Kept(
            f"captions/{edits.edited_layer(layer)}",
            lambda: edits.read_edits(self._storage, layer),
            lambda table: edits.write_edits(self._storage, layer, table),
        )
        before, _ = self._tables.change(kept, lambda table: edits.changed(table, place, text))
        return edits.text_of(before, row.key, slot)


def captions_of(storage: Storage, shard: str, key: str) -> list[dict[str, Any]]:
    """Return what each layer says of an image of a shard: {layer, over, edited, slot, text, raw, finish, flags, …}.

    Of a layer over another, only its own texts are returned. `edited` is whether `capstan view` can take the text back.
    """
    image = _image(storage, shard, key)
    found: list[dict[str, Any]] = []
    for layer in store.list_layers(storage):
        over = store.layer_recipe(storage, layer).get("over", "")
        try:
            rows = store.rows_of_shard(storage, layer, shard, image, ["key", "sha256", *_SHOWN])
        except FileNotFoundError:
            continue  # this shard is not captioned yet
        below = [{name: one[name] for name in _SHOWN} for one in found if one["layer"] == over]
        edited = bool(over) and layer == edits.edited_layer(over)
        shown = [row for row in rows.select(_SHOWN).to_pylist() if row not in below]
        found += [{"layer": layer, "over": over, "edited": edited, **row} for row in shown]
    return found


def _image(storage: Storage, shard: str, key: str) -> pa.Table:
    """Return key and sha256 of a shard's image."""
    table = storage.read_table(f"shards/{shard}.parquet", ["key", "sha256"])
    return table.filter(pc.equal(table["key"], key))
