"""A recipe → the samples of a run: one dataset, or several with weights; which captions and latents.

pin(recipe, train, run)          by one process: what "latest" and "auto" mean is written into the run folder
open_data(recipe, train, run)    by every worker
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import AUTO, Data, TrainConfig, WeightedDataset, family_class
from capstan.training.data.dataset import TrainingData, find_layer
from capstan.training.data.mixture import MixedData
from capstan.training.data.order import hash64
from capstan.training.data.shard_cache import ShardCache
from capstan.training.data.shard_reader import TARS
from capstan.training.precomputed import latents, text_embeddings
from capstan.training.precomputed.files import file_of
from capstan.training.run import Run

_FIELD = "train.data.datasets"


def shares(recipe: Recipe, train: TrainConfig) -> list[WeightedDataset]:
    """The datasets of a run, each with its weight and the layer that is asked for."""
    data = train.data
    found = data.datasets or [WeightedDataset(dataset=recipe.dataset)]
    return [
        share if "layer" in share.model_fields_set else share.model_copy(update={"layer": data.layer})
        for share in found
    ]


def open_storage(recipe: Recipe, share: WeightedDataset) -> Storage:
    return Storage(share.dataset, recipe.storage, field="dataset" if share.dataset == recipe.dataset else _FIELD)


def pin(recipe: Recipe, train: TrainConfig, run: Run) -> list[str | None]:
    """Settle for the whole run which caption layers and latents are meant; gives the layer of each dataset.

    Raises RecipeError where there are none, or where the autoencoder is no longer that of the run's latents.
    """
    found = shares(recipe, train)
    layers = [_pin(train, run, n, Dataset(open_storage(recipe, share)), share) for n, share in enumerate(found)]
    if train.data.latents == AUTO:
        now = fingerprint(latents.plan(train, Dataset(open_storage(recipe, found[0])))[1])
        if (begun := run.pinned("latents", lambda: now)) != now:
            problem = f"this run was begun on {begun}; of today's autoencoder and image size they would be {now}"
            raise RecipeError("train.data.latents", problem, "put back what they were, or name another train.run")
    return layers


def _pin(train: TrainConfig, run: Run, number: int, dataset: Dataset, share: WeightedDataset) -> str | None:
    layer = None
    if family_class(train.model).captions:
        layer = run.pinned(_name("layer", number), lambda: find_layer(dataset.storage, _asked(train, share)))
    if train.data.text_states == AUTO:
        run.pinned(_name("text_states", number), lambda: fingerprint(text_embeddings.plan(train, dataset, layer)))
    return layer


def _asked(train: TrainConfig, share: WeightedDataset) -> Data:
    """`train.data` as it is for one dataset."""
    return train.data.model_copy(update={"layer": share.layer})


def open_data(recipe: Recipe, train: TrainConfig, run: Run) -> TrainingData | MixedData:
    """The samples of a run, as `pin` has settled them."""
    found = shares(recipe, train)
    parts = [_open(recipe, train, run, number, share) for number, share in enumerate(found)]
    if train.data.datasets is None:
        return parts[0]
    batch = train.batch if train.data.buckets is not None else 1
    return MixedData(parts, names_of(found), [share.weight for share in found], train.seed, batch)


def _open(recipe: Recipe, train: TrainConfig, run: Run, number: int, share: WeightedDataset) -> TrainingData:
    data, storage = _asked(train, share), open_storage(recipe, share)

    def settled(name: str) -> str | None:
        return run.pinned(name, lambda: None)

    layer = settled(_name("layer", number)) if family_class(train.model).captions else None
    encoder = settled("latents") if data.latents == AUTO else data.latents
    cache = states = None
    files = [TARS if encoder is None else file_of(encoder)]
    if data.cache is not None and storage.local_path() is None:
        cache = ShardCache(storage, Path(data.cache.folder), int(data.cache.gib * 2**30))
    if data.text_states == AUTO:
        id_ = str(settled(_name("text_states", number)))
        states = text_embeddings.reader(storage, id_, cache)
        files.append(file_of(id_))
    return TrainingData(
        Dataset(storage),
        data,
        train.seed,
        layer=layer,
        latents=None if encoder is None else latents.reader(storage, encoder, cache),
        states=states,
        cache=cache,
        files=files,
        batch=train.batch,
        order_seed=hash64(train.seed, "dataset", number) if number else None,  # no two go in step
    )


def names_of(found: list[WeightedDataset]) -> list[str]:
    """A short name for each dataset: the last part of its path, and a number where that is not enough.

    >>> names_of([Share(dataset=name) for name in ("s3://a/laion", "./own", "s3://b/laion")])
    ['laion', 'own', 'laion-2']
    """
    names, seen = [], Counter[str]()
    for share in found:
        name = PurePosixPath(share.dataset).name or "dataset"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _name(what: str, number: int) -> str:
    """Under which name something of dataset `number` is pinned; the first one's as in a run of one dataset."""
    return what if number == 0 else f"{what} {number}"
