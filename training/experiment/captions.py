"""How true the captions are that arms are trained on: held against the scenes of the captioned world."""

from __future__ import annotations

import math
from typing import Any, Final

from pipeline.config import Recipe
from pipeline.shards import Dataset
from pipeline.storage import Storage
from pipeline.world.oracle import aggregate
from pipeline.world.rows import scene_of_url
from pipeline.world.text import compare, facts
from recaption.store import read_layer
from training.config import ORIGINAL
from training.experiment.prompts import world_of

_LOOKED_AT: Final = 1000  # pictures, the first by key: a random sample


def truth_of_captions(recipe: Recipe, layer: str | None) -> dict[str, dict[str, float | None]]:
    """Slot → what is stated rightly, as shares: of the original captions, and of the layer's where it has its own.

    A caption that says nothing of it counts as wrong. Empty for datasets that have no truth.
    """
    world = world_of(recipe)
    if world is None:
        return {}
    dataset, rows = Dataset(Storage(recipe.dataset, recipe.storage)), dict[str, list[dict[str, float]]]()
    for shard in dataset.shard_names:
        captions = {} if layer is None else read_layer(dataset.storage, layer, shard)
        table: list[dict[str, Any]] = dataset.table(shard, ["key", "url", "caption"]).to_pylist()
        for row in table[: _LOOKED_AT - len(rows.get(ORIGINAL, []))]:
            scene = scene_of_url(world, row["url"])
            for slot, text in ({ORIGINAL: row["caption"]} | captions.get(row["key"], {})).items():
                rows.setdefault(slot, []).append(compare(facts(text), scene))
    return {
        slot: {name: None if math.isnan(mean) else round(mean, 4) for name, mean in aggregate(found).items()}
        for slot, found in rows.items()
    }
