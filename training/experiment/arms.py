"""An experiment's recipe → the recipes of its runs, which differ only by captions.

    train.run/start/s0          a run of one step at almost no learning rate: the shared start of all arms of seed 0
    train.run/arms/original-s0  an ordinary run that starts from it; its `recipe.yaml` works with `capstan train`

The vocabulary is shared, learnt from the original captions and all captions of the layer. Learnt from the captions of
one arm, it would split the other arms' prompts into many tokens, and no arm could be added later.
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
from capstan.training.data.sources import find_layer
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
    """Yield all runs, seed by seed, so that every arm runs once before any runs twice."""
    for seed in config.seeds:
        for arm in config.arms:
            yield Trial(arm, seed)


def layers(recipe: Recipe, config: ExperimentConfig, train: TrainConfig, pinned: str | None) -> dict[str, str | None]:
    """Return arm → the id of its caption layer; `pinned` is the layer that "latest" meant when the experiment started.

    Raises RecipeError for a layer or a slot that the dataset does not have.
    """
    storage, ids = Storage(recipe.dataset, recipe.storage), dict[str, str | None]()
    for name, arm in config.arms.items():
        layer = arm.layer or pinned or train.data.layer
        if layer is None and set(arm.shares) != {ORIGINAL}:
            hint = f"set a caption layer there, or experiment.arms.{name}.layer"
            raise RecipeError("train.data.layer", f"is null, but the arm {name} uses its captions", hint)
        try:
            ids[name] = None if layer is None else find_layer(storage, Data(layer=layer, blend=arm.shares))
        except RecipeError as error:
            key = "blend" if error.field.endswith("blend") else "layer"
            raise RecipeError(f"experiment.arms.{name}.{key}", error.problem, error.hint) from None
    return ids


def trial_folder(folder: Path, trial: Trial) -> Path:
    return folder / "arms" / trial.name


def start_folder(folder: Path, seed: int) -> Path:
    return folder / "start" / f"s{seed}"


def start_recipe(recipe: Recipe, slots: Sequence[str], layer: str | None, folder: Path, seed: int) -> Recipe:
    """Return the recipe of the run that all arms of a seed start from. Its one step is too small to change a weight."""
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
    """Return the recipe of one run, up to `steps` (default: the recipe's own).

    Changes `run`, `seed`, `init`, `data.layer`, `data.blend` and the upload folder of `train`.
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
    """Return `checkpoint` with the run's own upload folder, if the recipe sets `train.checkpoint.upload`."""
    assert recipe.train is not None
    settings = recipe.train.get("checkpoint") or {}
    if not settings.get("upload"):
        return {}
    return {"checkpoint": settings | {"upload": f"{settings['upload'].rstrip('/')}/{name}"}}


def _with(recipe: Recipe, changed: dict[str, Any]) -> Recipe:
    """Return the recipe without `experiment`, with the changed values in `train`; `train.data` is merged key by key."""
    assert recipe.train is not None
    train = recipe.train | changed | {"data": (recipe.train.get("data") or {}) | changed["data"]}
    return recipe.model_copy(update={"train": train, "experiment": None})
