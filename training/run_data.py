"""A recipe → the samples of a run: datasets, captions, latents

pin(recipe, train, run)          in one process: writes what "latest" and "auto" mean into the run folder
open_data(recipe, train, run)    in every worker
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.training.config import AUTO, TrainConfig, WeightedDataset
from capstan.training.config.families import reads_captions, traits_of
from capstan.training.data.dataset import TrainingData
from capstan.training.data.mixture import MixedData
from capstan.training.data.order import hash64
from capstan.training.data.shard_cache import ShardCache
from capstan.training.data.shard_reader import TARS
from capstan.training.data.sources import data_for, find_layer, open_storage, weighted_datasets
from capstan.training.precomputed import latents, text_embeddings
from capstan.training.precomputed.files import file_pattern
from capstan.training.run import Run


def pin(recipe: Recipe, train: TrainConfig, run: Run) -> list[str | None]:
    """Fix the caption layers and latents for the whole run; return the layer of each dataset.

    Raises RecipeError if one is missing, or if the autoencoder is not the one of the run's latents.
    """
    sources = weighted_datasets(recipe, train)
    layers = [_pin(train, run, n, Dataset(open_storage(recipe, source)), source) for n, source in enumerate(sources)]
    if train.data.latents == AUTO:
        now = fingerprint(latents.plan(train, Dataset(open_storage(recipe, sources[0]))))
        if (pinned := run.pinned("latents", lambda: now)) != now:
            problem = (
                f"this run was started with latents {pinned}, but the current autoencoder and image size give {now}"
            )
            hint = "restore the autoencoder and size, or choose another train.run"
            raise RecipeError("train.data.latents", problem, hint)
    return layers


def _pin(train: TrainConfig, run: Run, number: int, dataset: Dataset, source: WeightedDataset) -> str | None:
    layer = None
    if reads_captions(train):
        layer = run.pinned(_name("layer", number), lambda: find_layer(dataset.storage, data_for(train, source)))
    if train.data.text_states == AUTO:
        run.pinned(_name("text_states", number), lambda: fingerprint(text_embeddings.plan(train, dataset, layer)))
    return layer


def open_data(recipe: Recipe, train: TrainConfig, run: Run, world: int = 1) -> TrainingData | MixedData:
    """Return the samples of a run, as fixed by `pin` and the run's lanes, for one of `world` workers."""
    sources, lanes = weighted_datasets(recipe, train), run.lanes
    # Datasets are mixed by whole batches, which have one bucket; or else by one sample of each lane at a time.
    single = train.data.datasets is None or train.data.buckets is not None
    batch = train.batch if single else lanes
    shared = {"batch": batch, "lanes": lanes, "world": world}
    parts = [_open(recipe, train, run, number, source, shared) for number, source in enumerate(sources)]
    if train.data.datasets is None:
        return parts[0]
    weights = [source.weight for source in sources]
    whole = None if single else train.batch
    return MixedData(parts, names_of(sources), weights, train.seed, batch, whole)


def _open(
    recipe: Recipe, train: TrainConfig, run: Run, number: int, source: WeightedDataset, shared: Mapping[str, int]
) -> TrainingData:
    data, storage = data_for(train, source), open_storage(recipe, source)

    def pinned(name: str) -> str | None:
        return run.pinned(name, lambda: None)

    layer = pinned(_name("layer", number)) if reads_captions(train) else None
    encoder = pinned("latents") if data.latents == AUTO else data.latents
    cache = states = None
    files = [TARS if encoder is None else file_pattern(encoder)]
    if data.cache is not None and storage.local_path() is None:
        cache = ShardCache(storage, Path(data.cache.folder), int(data.cache.gib * 2**30))
    if data.text_states == AUTO:
        id_ = str(pinned(_name("text_states", number)))
        states = text_embeddings.reader(storage, id_, cache)
        files.append(file_pattern(id_))
    return TrainingData(
        Dataset(storage),
        data,
        train.seed,
        layer=layer,
        latents=None if encoder is None else latents.reader(storage, encoder, cache),
        states=states,
        cache=cache,
        files=files,
        parts=traits_of(train.model).reads,
        order_seed=hash64(train.seed, "dataset", number) if number else None,  # datasets must not share one order
        **shared,
    )


def names_of(sources: list[WeightedDataset]) -> list[str]:
    """Return a short name for each dataset: the last part of its path, numbered if it repeats.

    >>> names_of([WeightedDataset(dataset=name) for name in ("s3://a/laion", "./own", "s3://b/laion")])
    ['laion', 'own', 'laion-2']
    """
    names, seen = [], Counter[str]()
    for source in sources:
        name = PurePosixPath(source.dataset).name or "dataset"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _name(what: str, number: int) -> str:
    """Return the key in pinned.json for dataset `number`; the first one has no number."""
    return what if number == 0 else f"{what} {number}"
