"""A recipe → latents and text states of all its samples (`capstan encode`)

`capstan train` runs the same before training if the recipe says `auto`. Text states are encoded if the recipe's text
encoder is frozen (`train.diffusion.text.pretrained`). The unit map skips shards that are already encoded.
"""

from __future__ import annotations

import json
from typing import Any

from capstan.pipeline import units
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import Quarantined
from capstan.pipeline.lease import lease
from capstan.training.config import AUTO, TrainConfig, WeightedDataset
from capstan.training.config.families import family_class
from capstan.training.data.sources import data_for, find_layer, open_storage, weighted_datasets
from capstan.training.precomputed import latents, text_embeddings
from capstan.training.run import Run
from capstan.training.run_data import pin

Job = latents.LatentsJob | text_embeddings.TextStatesJob


def encode(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Encode every shard that has no latents or text states yet; return a summary with the latents' id, `encoder`.

    Set `train.data.latents` to that id, or to `auto`, to train on them. Raises Quarantined if some shards could not
    be encoded.
    """
    train = TrainConfig.from_recipe(recipe)
    summaries = [_images(recipe, train, source, progress) for source in weighted_datasets(recipe, train)]
    if family_class(train.model).text_encoder(train) is not None:
        for source in weighted_datasets(recipe, train):
            layer = find_layer(open_storage(recipe, source), data_for(train, source))
            summaries.append(_texts(recipe, train, source, layer, progress))
    return _sum(summaries)


def encode_missing(recipe: Recipe, *, progress: bool = True) -> None:
    """Encode what `train.data.latents: auto` and `text_states: auto` request, before the workers start.

    Captions come from the layer that the run is pinned to, even if a later one exists now.
    """
    train = TrainConfig.from_recipe(recipe)
    layers = pin(recipe, train, Run(train))
    for source, layer in zip(weighted_datasets(recipe, train), layers, strict=True):
        if train.data.latents == AUTO:
            _images(recipe, train, source, progress)
        if train.data.text_states == AUTO:
            _texts(recipe, train, source, layer, progress)


def _images(recipe: Recipe, train: TrainConfig, source: WeightedDataset, progress: bool) -> dict[str, Any]:
    dataset = Dataset(open_storage(recipe, source))
    identity = latents.plan(train, Dataset(open_storage(recipe, weighted_datasets(recipe, train)[0])))
    job = latents.LatentsJob(dataset, train, identity, recipe.resources)
    return {"encoder": job.encoder, **_run(job, recipe, progress)}


def _texts(
    recipe: Recipe, train: TrainConfig, source: WeightedDataset, layer: str | None, progress: bool
) -> dict[str, Any]:
    dataset = Dataset(open_storage(recipe, source))
    job = text_embeddings.TextStatesJob(dataset, train, text_embeddings.plan(train, dataset, layer), recipe.resources)
    counts = _run(job, recipe, progress)
    return {"text_states": job.encoder, "captions": counts.pop("samples"), **counts}


def _run(job: Job, recipe: Recipe, progress: bool) -> dict[str, Any]:
    with lease(job.storage, "encode", job.folder, wait=True):  # several runs may need the same files
        job.storage.write(f"{job.folder}/recipe.json", json.dumps(job.identity, indent=1).encode())
        work = [job.unit(entry) for entry in job.dataset.manifest.shards]
        job.markers.forget(job.stale(work))
        summary = units.run(job, work, recipe.resources, progress=progress)
    if summary.quarantined:
        raise Quarantined(job.name, summary.quarantined)
    counts = {name: int(count) for name, count in summary.counts.items()}
    return {"shards_done": summary.done, "shards_skipped": summary.skipped, **counts}


def _sum(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one summary: counts added up, and the first of each name."""
    total: dict[str, Any] = {}
    for name, value in ((name, value) for summary in summaries for name, value in summary.items()):
        total[name] = total[name] + value if name in total and isinstance(value, int) else total.get(name, value)
    return total
