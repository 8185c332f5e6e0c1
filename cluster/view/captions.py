"""A row → its captions in every layer: text, raw text, flags"""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from capstan.pipeline.storage import Storage
from capstan.recaption import store


def captions_of(storage: Storage, shard: str, key: str) -> list[dict[str, Any]]:
    """Return what each layer says of an image of a shard, the oldest layer first: {layer, slot, text, flags}."""
    if not shard:
        return []
    table = storage.read_table(f"shards/{shard}.parquet", ["key", "sha256"])
    image = table.filter(pc.equal(table["key"], key))
    found = []
    for layer in store.list_layers(storage):
        try:
            rows = store.rows_of_shard(storage, layer, shard, image)
        except FileNotFoundError:
            continue  # this shard is not captioned yet
        found += [
            {"layer": layer, "slot": row["slot"], "text": row["text"], "flags": row["flags"]}
            for row in rows.to_pylist()
        ]
    return found
