"""Accuracy of the training captions on the captioned world; prompts among them."""

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
from capstan.training.experiment.prompts import Prompts
from capstan.training.metrics.samples import world_of

_SAMPLED: Final = 1000  # images, the first by key: a random sample, as keys are hashes


def caption_accuracy(recipe: Recipe, layer: str | None) -> dict[str, dict[str, float | None]]:
    """Return slot → attribute → share that captions state correctly, for original captions and the layer's slots.

    An attribute that a caption does not mention counts as wrong. Empty for datasets without ground truth.
    """
    world = world_of(recipe)
    if world is None:
        return {}
    dataset, rows = Dataset(Storage(recipe.dataset, recipe.storage)), dict[str, list[dict[str, float]]]()
    for shard in dataset.shard_names:
        captions = {} if layer is None else read_layer(dataset.storage, layer, shard)
        table: list[dict[str, Any]] = dataset.table(shard, ["key", "url", "caption"]).to_pylist()
        for row in table[: _SAMPLED - len(rows.get(ORIGINAL, []))]:
            scene = scene_of_url(world, row["url"])
            for slot, text in ({ORIGINAL: row["caption"]} | captions.get(row["key"], {})).items():
                rows.setdefault(slot, []).append(compare(facts(text), scene))
    return {
        slot: {name: None if math.isnan(mean) else round(mean, 4) for name, mean in aggregate(values).items()}
        for slot, values in rows.items()
    }


def shown_captions(recipe: Recipe, layer: str | None, holdout: int = 0) -> Iterator[dict[str, str]]:
    """Yield slot → caption of each training sample, in dataset order; held-out samples are the last and left out."""
    dataset = Dataset(Storage(recipe.dataset, recipe.storage))
    left = sum(shard.samples for shard in dataset.manifest.shards) - holdout
    for shard in dataset.shard_names:
        captions = {} if layer is None else read_layer(dataset.storage, layer, shard)
        for row in dataset.table(shard, ["key", "caption"]).to_pylist()[: max(0, left)]:
            yield {ORIGINAL: row["caption"]} | captions.get(row["key"], {})
            left -= 1


def prompt_statistics(sets: Prompts, captions: Iterable[Mapping[str, str]]) -> dict[str, dict[str, float]]:
    """Return statistics of each set of prompts; `captions` are those of `shown_captions`.

    `distinct`: number of distinct texts. `trained_on`: share of prompts that are training captions word for word.
    `kept`: share of the things in prompts that the expanded prompts still name.
    """
    texts_of_prompts = {prompt.drawn or prompt.text for prompts in sets.values() for prompt in prompts}
    known = {text for row in captions for text in row.values() if text in texts_of_prompts}
    statistics = dict[str, dict[str, float]]()
    for name, prompts in sets.items():
        texts = [prompt.drawn or prompt.text for prompt in prompts]
        statistics[name] = {
            "distinct": len(set(texts)),
            "trained_on": round(sum(text in known for text in texts) / len(texts), 4),
        }
        pairs = [(_things(p.wanted), _things(read(p.drawn))) for p in prompts if p.drawn is not None and p.wanted]
        if requested := sum(wanted.total() for wanted, _ in pairs):
            named = sum((wanted & expanded).total() for wanted, expanded in pairs)
            statistics[name]["kept"] = round(named / requested, 4)
    return statistics


def _things(wanted: Wanted) -> Counter[str]:
    """Count the shapes that a prompt names, with their colours if given."""
    return Counter([*(f"{thing.colour} {thing.shape}" for thing in wanted.things), *wanted.bare])
