"""The captions that arms are trained on: how true they are of the captioned world, and which prompts are among them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.captions import compare, facts
from capstan.pipeline.world.oracle import aggregate
from capstan.pipeline.world.prompt_score import Wanted, read
from capstan.pipeline.world.table import scene_of_url
from capstan.recaption.store import read_layer
from capstan.training.config import ORIGINAL
from capstan.training.experiment.prompts import Prompts, world_of

_LOOKED_AT: Final = 1000  # images, the first by key: a random sample


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


def shown_captions(recipe: Recipe, layer: str | None, holdout: int = 0) -> Iterator[dict[str, str]]:
    """Slot → caption of each sample that arms are trained on, in the samples' order; those held out come last."""
    dataset = Dataset(Storage(recipe.dataset, recipe.storage))
    left = sum(shard.samples for shard in dataset.manifest.shards) - holdout
    for shard in dataset.shard_names:
        captions = {} if layer is None else read_layer(dataset.storage, layer, shard)
        for row in dataset.table(shard, ["key", "caption"]).to_pylist()[: max(0, left)]:
            yield {ORIGINAL: row["caption"]} | captions.get(row["key"], {})
            left -= 1


def about_prompts(sets: Prompts, captions: Iterable[Mapping[str, str]]) -> dict[str, dict[str, float]]:
    """Set → `distinct`: how many texts it has; `trained_on`: the share of its prompts that are captions word for word;
    `kept`: of the things that prompts ask for, the share that expanded prompts still name.

    `captions` are those of `shown_captions`.
    """
    asked_for = {prompt.drawn or prompt.text for prompts in sets.values() for prompt in prompts}
    known = {text for row in captions for text in row.values() if text in asked_for}
    found = dict[str, dict[str, float]]()
    for name, prompts in sets.items():
        texts = [prompt.drawn or prompt.text for prompt in prompts]
        found[name] = {
            "distinct": len(set(texts)),
            "trained_on": round(sum(text in known for text in texts) / len(texts), 4),
        }
        pairs = [(_things(p.wanted), _things(read(p.drawn))) for p in prompts if p.drawn is not None and p.wanted]
        if asked := sum(wanted.total() for wanted, _ in pairs):
            found[name]["kept"] = round(sum((wanted & said).total() for wanted, said in pairs) / asked, 4)
    return found


def _things(wanted: Wanted) -> Counter[str]:
    """What a prompt names: shapes, with their colours where it gives them."""
    return Counter([*(f"{thing.colour} {thing.shape}" for thing in wanted.things), *wanted.bare])
