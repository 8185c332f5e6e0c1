"""An experiment's recipe → the recipes of its runs: arms that differ by their captions alone.

    train.run/start/s0          a run of one step at no rate: the weights and vocabulary that all arms of seed 0 share
    train.run/arms/original-s0  an ordinary run that begins there; `recipe.yaml` in it is what `capstan train` takes

A vocabulary learnt from one arm's captions would be another one for each arm, and would cut the others' prompts into
crumbs: it is learnt from all captions of the layer and the original ones, so that arms can still be added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import ORIGINAL, Data, TrainConfig
from capstan.training.data.dataset import find_layer
from capstan.training.experiment.config import Arm, ExperimentConfig

_NO_RATE: Final = 1e-12  # AdamW's first step moves a weight by about the rate


@dataclass(frozen=True)
class Trial:
    """One run of the experiment: an arm with a seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-s{self.seed}"


def trials(config: ExperimentConfig) -> Iterator[Trial]:
    """All runs, seed by seed, so that every arm is seen once before any is seen twice."""
    for seed in config.seeds:
        for arm in config.arms:
            yield Trial(arm, seed)


def layers(recipe: Recipe, config: ExperimentConfig, train: TrainConfig, pinned: str | None) -> dict[str, str | None]:
    """Arm → the id of its caption layer; `pinned` is what "latest" meant when the experiment began.

    Raises RecipeError for a layer or a slot that the dataset does not have.
    """
    storage, found = Storage(recipe.dataset, recipe.storage), dict[str, str | None]()
    for name, arm in config.arms.items():
        layer = arm.layer or pinned or train.data.layer
        if layer is None and set(arm.shares) != {ORIGINAL}:
            hint = f"name the arm's own (experiment.arms.{name}.layer)"
            raise RecipeError("train.data.layer", f"is null, and the arm {name} shows its captions", hint)
        try:
            found[name] = None if layer is None else find_layer(storage, Data(layer=layer, blend=arm.shares))
        except RecipeError as error:
            where = "blend" if error.field.endswith("blend") else "layer"
            raise RecipeError(f"experiment.arms.{name}.{where}", error.problem, error.hint) from None
    return found


def trial_folder(folder: Path, trial: Trial) -> Path:
    return folder / "arms" / trial.name


def start_folder(folder: Path, seed: int) -> Path:
    return folder / "start" / f"s{seed}"


def start_recipe(recipe: Recipe, slots: Sequence[str], layer: str | None, folder: Path, seed: int) -> Recipe:
    """The run from which all arms of a seed begin, on all captions alike. Its step is too small to change a weight."""
    changed: dict[str, Any] = {
        "run": str(start_folder(folder, seed)),
        "seed": seed,
        "steps": 1,
        "lr": _NO_RATE,
        "ema": None,
        "data": {"layer": layer, "blend": dict.fromkeys(sorted(slots), 1.0)},
    }
    return _with(recipe, changed | _copy(recipe, f"start/s{seed}"))


def arm_recipe(
    recipe: Recipe, arm: Arm, layer: str | None, folder: Path, trial: Trial, steps: int | None = None
) -> Recipe:
    """The recipe of one run, up to `steps` (the recipe's own, by default).

    Of `train` it changes the run's folder, the seed, where it starts, and of `data` the layer and the blend.
    """
    assert recipe.train is not None
    start = recipe.train.get("init") or str(start_folder(folder, trial.seed))
    changed: dict[str, Any] = {
        "run": str(trial_folder(folder, trial)),
        "seed": trial.seed,
        "init": start,
        "data": {"layer": layer, "blend": arm.shares},
    }
    changed |= _copy(recipe, f"arms/{trial.name}") | ({"steps": steps} if steps is not None else {})
    return _with(recipe, changed)


def _copy(recipe: Recipe, name: str) -> dict[str, Any]:
    """A run's own place in the bucket of `train.checkpoint.upload`, where the recipe names one."""
    assert recipe.train is not None
    settings = recipe.train.get("checkpoint") or {}
    if not settings.get("upload"):
        return {}
    return {"checkpoint": settings | {"upload": f"{settings['upload'].rstrip('/')}/{name}"}}


def _with(recipe: Recipe, changed: dict[str, Any]) -> Recipe:
    """The recipe without the experiment, and with other values in `train`; those in `train.data` one by one."""
    assert recipe.train is not None
    train = recipe.train | changed | {"data": (recipe.train.get("data") or {}) | changed["data"]}
    return recipe.model_copy(update={"train": train, "experiment": None})
