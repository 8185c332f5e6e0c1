"""What would end a training run, found in seconds: before its folder exists, and before torch and Ray are loaded

`capstan train` runs these checks first, and `capstan doctor` the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from capstan.pipeline.config import Recipe
from capstan.training.config import TrainConfig
from capstan.training.config.machine import check_machine
from capstan.training.data.sources import check_sources
from capstan.training.product import find_product

Checks = dict[str, Callable[[], None]]


def run_checks(recipe: Recipe, train: TrainConfig) -> Checks:
    """Return what to check before a run is started, by name; each raises RecipeError."""
    return {
        "training machine": functools.partial(check_machine, train, recipe.resources),
        "training data": functools.partial(check_sources, recipe, train),
        "models to start from": functools.partial(check_models, train),
    }


def check_ready(recipe: Recipe, train: TrainConfig) -> None:
    """Raise RecipeError for the first thing that a run needs and does not have."""
    for check in run_checks(recipe, train).values():
        check()


def check_models(train: TrainConfig) -> None:
    """Raise RecipeError if a finished model on this machine that the run starts from is not there."""
    made = {earlier["run"] for earlier in train.before}  # by the runs that come before
    for field, path in models_of(train).items():
        if "://" not in path and path not in made:
            find_product(path, field)


def models_of(train: TrainConfig) -> dict[str, str]:
    """Return field of the recipe → path or URL, for every finished model that the run starts from."""
    own = train.settings.models() if hasattr(train.settings, "models") else {}
    named = {f"train.{train.model}.{key}": path for key, path in own.items()}
    return named | ({} if train.init is None else {"train.init": train.init})
