"""A recipe against this machine: its storage, the room it needs, its shards, its model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from capstan.cluster.doctor.clock_skew import clock_against
from capstan.cluster.doctor.estimates import disk_bytes, parameters, state_bytes
from capstan.cluster.doctor.finding import Finding, size
from capstan.cluster.recipe import load
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import read_manifest
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage, find_files
from capstan.training.config import TrainConfig

_ACTIVATIONS: Final = 0.4  # of a GPU's memory is left to activations and fragments


def recipe_findings(path: Path, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """Everything that a run of the recipe would need, in the order in which it would need it."""
    try:
        recipe = load(path, overrides)
    except CapstanError as error:
        yield _failed("recipe", error)
        return
    yield Finding("recipe", True, str(path))
    storage = Storage(recipe.dataset, recipe.storage)
    if recipe.dataset.startswith("s3://"):
        endpoint = recipe.storage.get("endpoint_url") or "https://s3.amazonaws.com"
        if (clock := clock_against(str(endpoint))) is not None:
            yield clock
    try:
        storage.check_writable()
    except CapstanError as error:
        yield _failed("dataset", error)
        return
    yield Finding("dataset", True, f"{recipe.dataset}: a file was written, read and removed")
    yield from _room(recipe, storage)
    yield from _shards(recipe, storage)
    yield from _model(recipe)


def _failed(name: str, error: CapstanError) -> Finding:
    problem = getattr(error, "problem", None)
    return Finding(
        name,
        False,
        f"{getattr(error, 'field', name)}: {problem}" if problem else str(error),
        getattr(error, "mend", "see above"),
    )


def _room(recipe: Recipe, storage: Storage) -> Iterator[Finding]:
    """Disk space against what the dataset is expected to take."""
    rows, where = rows_of(recipe), storage.local_path()
    if rows is None or where is None or read_manifest(storage) is not None:
        return
    while not where.exists():
        where = where.parent
    needed, free = disk_bytes(recipe, rows), shutil.disk_usage(where).free
    seen = f"{size(free)} free; about {size(needed)} for {rows:,} rows at {recipe.image.size} pixels"
    hint = "name a dataset on a larger disk or in a bucket, or a smaller image.size or image.quality"
    yield Finding("room for the dataset", free > 1.1 * needed, seen, hint)


def rows_of(recipe: Recipe) -> int | None:
    """Rows of the source, where that is known without reading it."""
    source = recipe.source
    if source is None:
        return None
    if source.format == "world":
        return source.world.scenes if source.world else 1000
    paths = source.path if isinstance(source.path, list) else [source.path]
    if any(path is None or "://" in path for path in paths):
        return None
    try:
        files = [file.path for path in paths for file in find_files(str(path), {})]
        known = all(file.endswith(".parquet") for file in files)
        return sum(pq.read_metadata(file).num_rows for file in files) if known else None
    except (OSError, RecipeError, pa.ArrowInvalid):
        return None  # building says what is wrong with the source


def _shards(recipe: Recipe, storage: Storage) -> Iterator[Finding]:
    """Shards against ranks × loader threads: each is to have a tar of its own to read."""
    manifest = read_manifest(storage)
    if recipe.train is None or manifest is None or not manifest.shards:
        return
    train = TrainConfig.from_recipe(recipe)
    samples = sum(entry.samples for entry in manifest.shards) - train.data.holdout
    readers = train.engine.most * train.data.threads
    seen = (
        f"{len(manifest.shards)} shards, {samples:,} samples to train on, {readers} readers, batches of {train.batch}"
    )
    hint = f"set shards.samples to at most {max(1, samples // readers)} and run `capstan select`, or fewer workers"
    enough = len(manifest.shards) >= readers and samples >= train.batch
    yield Finding("shards", enough, seen, hint)


def _model(recipe: Recipe) -> Iterator[Finding]:
    """The model's state against the memory of the smallest GPU."""
    if recipe.train is None:
        return
    import torch

    train = TrainConfig.from_recipe(recipe)
    count = parameters(train)
    if count is None:
        return
    needed = state_bytes(train, count)
    seen = f"{count / 1e6:,.1f} million parameters, {size(needed)} a worker before activations"
    if not torch.cuda.is_available():
        yield Finding("model", True, seen)
        return
    gpus = torch.cuda.device_count()
    least = min(torch.cuda.get_device_properties(number).total_memory for number in range(gpus))
    hint = "set engine.zero: 3, more engine.workers, or a smaller model"
    yield Finding("model", needed < (1 - _ACTIVATIONS) * least, f"{seen}; the smallest GPU has {size(least)}", hint)
    if train.engine.least > gpus:
        hint = f"set engine.workers to at most {gpus}, or submit to a cluster"
        yield Finding("workers", False, f"{train.engine.least} workers, {gpus} GPUs here", hint)
