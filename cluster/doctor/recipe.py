"""Checks of a recipe on this machine: extras, storage, disk space, shards, model"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from capstan.cluster.doctor.clock_skew import clock_against
from capstan.cluster.doctor.commands import command_findings, failed
from capstan.cluster.doctor.estimates import disk_bytes, parameters, state_bytes
from capstan.cluster.doctor.finding import Finding, size
from capstan.cluster.recipe import load
from capstan.pipeline import extras
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Manifest, read_manifest
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage, find_files
from capstan.training.config import TrainConfig

_ACTIVATIONS: Final = 0.4  # share of a GPU's memory that is left for activations and fragmentation


def recipe_findings(path: Path, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """Check what a run of the recipe needs, in the order in which it needs it."""
    try:
        recipe = load(path, overrides)
    except CapstanError as error:
        yield failed("recipe", error)
        return
    yield Finding("recipe", True, str(path))
    yield from _extras(recipe)
    storage = Storage(recipe.dataset, recipe.storage)
    if recipe.dataset.startswith("s3://"):
        endpoint = recipe.storage.get("endpoint_url") or "https://s3.amazonaws.com"
        if (clock := clock_against(str(endpoint))) is not None:
            yield clock
    try:
        storage.check_writable()
    except CapstanError as error:
        yield failed("dataset", error)
        return
    yield Finding("dataset", True, f"{recipe.dataset}: a file was written, read and removed")
    try:
        manifest = read_manifest(storage)
    except CapstanError as error:
        yield failed("manifest", error)
        return
    yield from command_findings(recipe, storage, manifest)
    yield from _room(recipe, storage, manifest)
    yield from _shards(recipe, manifest)
    yield from _model(recipe)


def needed_extras(recipe: Recipe) -> Iterator[str]:
    """Yield the extras that the recipe's sections need."""
    score = recipe.score
    if (
        recipe.recaption is not None
        or any((score.clip, score.aesthetic, score.watermark))
        or (score.nsfw is not None and score.nsfw.weights is not None)
    ):
        yield extras.RECAPTION
    if recipe.train is not None:
        yield extras.TRAIN
    if score.language is not None:
        yield "language"
    by_open_nsfw = score.nsfw is not None and score.nsfw.weights is None
    if by_open_nsfw or (recipe.dedup.copies is not None and recipe.dedup.copies.model == "open_nsfw"):
        yield "nsfw"
    if score.text_in_image is not None:
        yield "ocr"
    if recipe.dedup.copies is not None and recipe.dedup.copies.model != "open_nsfw":
        yield "copies"


def _extras(recipe: Recipe) -> Iterator[Finding]:
    """Check that the extras that the recipe's sections need are installed."""
    for extra in needed_extras(recipe):
        package = extras.missing(extra)
        seen = "installed" if package is None else f"needs the package {package}"
        yield Finding(f"extra {extra}", package is None, seen, f"pip install 'capstan-t2i[{extra}]'")


def _room(recipe: Recipe, storage: Storage, manifest: Manifest | None) -> Iterator[Finding]:
    """Compare free disk space with the expected size of the dataset."""
    rows, where = rows_of(recipe), storage.local_path()
    if rows is None or where is None or manifest is not None:
        return
    while not where.exists():
        where = where.parent
    needed, free = disk_bytes(recipe, rows), shutil.disk_usage(where).free
    seen = f"{size(free)} free; about {size(needed)} for {rows:,} rows at {recipe.image.size} pixels"
    hint = "put the dataset on a larger disk or in a bucket, or reduce image.size or image.quality"
    yield Finding("room for the dataset", free > 1.1 * needed, seen, hint)


def rows_of(recipe: Recipe) -> int | None:
    """Return the number of rows of the source, or None if it is not known without reading them."""
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
        return None  # `capstan build` reports what is wrong with the source


def _shards(recipe: Recipe, manifest: Manifest | None) -> Iterator[Finding]:
    """Compare the number of shards with ranks × loader threads: each should have a tar of its own to read."""
    if recipe.train is None or manifest is None or not manifest.shards or extras.missing(extras.TRAIN) is not None:
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
    """Compare the model's state with the memory of the smallest GPU."""
    if recipe.train is None or extras.missing(extras.TRAIN) is not None:
        return
    import torch

    train = TrainConfig.from_recipe(recipe)
    count = parameters(train)
    if count is None:
        return
    needed = state_bytes(train, count)
    seen = f"{count / 1e6:,.1f} million parameters, {size(needed)} per worker before activations"
    if not torch.cuda.is_available():
        yield Finding("model", True, seen)
        return
    gpus = torch.cuda.device_count()
    least = min(torch.cuda.get_device_properties(number).total_memory for number in range(gpus))
    hint = "set engine.zero: 3, more engine.workers, or a smaller model"
    yield Finding("model", needed < (1 - _ACTIVATIONS) * least, f"{seen}; the smallest GPU has {size(least)}", hint)
