"""A recipe → the datasets of a run, and the caption layer of each"""

from __future__ import annotations

import difflib
from typing import Final

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption.store import empty_slots, latest_layer, layer_recipe, list_layers, model_layer
from capstan.training.config import ORIGINAL, Data, TrainConfig, WeightedDataset
from capstan.training.config.families import reads_captions

_FIELD: Final = "train.data.datasets"


def weighted_datasets(recipe: Recipe, train: TrainConfig) -> list[WeightedDataset]:
    """Return the datasets of a run, each with its weight and requested caption layer."""
    data = train.data
    sources = data.datasets or [WeightedDataset(dataset=recipe.dataset)]
    return [
        source if "layer" in source.model_fields_set else source.model_copy(update={"layer": data.layer})
        for source in sources
    ]


def open_storage(recipe: Recipe, source: WeightedDataset) -> Storage:
    """Return the storage of one of a run's datasets."""
    return Storage(source.dataset, recipe.storage, field="dataset" if source.dataset == recipe.dataset else _FIELD)


def data_for(train: TrainConfig, source: WeightedDataset) -> Data:
    """Return `train.data` for one dataset."""
    return train.data.model_copy(update={"layer": source.layer})


def check_sources(recipe: Recipe, train: TrainConfig) -> None:
    """Raise RecipeError if a dataset of the run is missing, or lacks the caption layer that it is to be read with."""
    for source in weighted_datasets(recipe, train):
        storage = open_storage(recipe, source)
        storage.check_reachable()
        Dataset(storage)
        if reads_captions(train):
            find_layer(storage, data_for(train, source))


def find_layer(storage: Storage, data: Data) -> str | None:
    """Return the id of the caption layer that `train.data.layer` names, or None for the original captions.

    Raises RecipeError if the layer, or a slot of the blend, does not exist, or if captions are missing.
    """
    if data.layer is None:
        return None
    layer = latest_layer(storage) if data.layer == "latest" else data.layer
    if layer is None or layer not in list_layers(storage):
        known = list_layers(storage)
        problem = f"{storage.url} has no caption layer" + ("" if layer is None else f" {layer!r}")
        hint = f"use latest, or one of {', '.join(known)}" if known else "run `capstan recaption` first"
        hint += ", or set layer: null to train on the original captions"
        raise RecipeError("train.data.layer", problem, hint)
    recipe = layer_recipe(storage, layer)
    slots = [*recipe["slots"], ORIGINAL]
    for slot in data.weights:
        if slot not in slots:
            near = difflib.get_close_matches(slot, slots, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(slots)}"
            raise RecipeError("train.data.blend", f"layer {layer} has no slot {slot!r}", hint)
    model = model_layer(storage, layer)  # layers written by people may be partial
    existing = set(storage.names(f"captions/{model}"))
    for shard in [] if model is None else Dataset(storage).shard_names:
        if f"captions/{model}/{shard}.parquet" not in existing:
            hint = "run `capstan recaption` to complete it"
            raise RecipeError("train.data.layer", f"layer {model} has no captions of {shard}", hint)
    if empty := empty_slots(storage, layer, (slot for slot, weight in data.weights.items() if weight)):
        hint = "run `capstan recaption` again (its summary lists why captions failed), or use another layer"
        raise RecipeError("train.data.layer", f"layer {layer} has no caption in slot {', '.join(empty)}", hint)
    return layer
