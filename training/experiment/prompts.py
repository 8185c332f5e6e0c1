"""A recipe → the prompts that arms are held to: two sets, as in the DALL-E 3 paper (section 3.1).

    original      captions as they come with images
    descriptive   descriptions of images

On the captioned world both are of scenes that no dataset holds; a careless web writes the first, and of these only
those count which are English and say something that can be looked for in an image. The descriptions are true. Of any
other dataset they are the captions of the samples held out (`train.data.holdout`), and the second are the captioner's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.captions import alt, alt_kind, descriptive
from capstan.pipeline.world.prompt_score import Wanted, read
from capstan.pipeline.world.render import render
from capstan.pipeline.world.scene import draw_scene, vocabulary
from capstan.recaption.store import read_layer
from capstan.training.config import TrainConfig
from capstan.training.experiment.config import ExperimentConfig

SETS: Final = ("original", "descriptive")
UPSAMPLED: Final = "upsampled"  # the first set, drawn from prompts that were expanded, and held to what was asked for
_UNSEEN: Final = 8_641_000_001  # added to the world's seed: none that a dataset or `capstan evaluate` draws from
_MEANT: Final = ("fragment", "partial", "honest")  # kinds of alt text that are of the image, and English


@dataclass(frozen=True)
class Prompt:
    """A prompt, the seed of its noise, and on the captioned world what it asks for and the image that it is of."""

    text: str  # what an image is held to
    seed: int
    drawn: str | None = None  # what the model is given in its place; null: `text`
    wanted: Wanted | None = None
    image: np.ndarray | None = None  # uint8 [side, side, 3]


Prompts = dict[str, list[Prompt]]  # set → prompts


def prompt_sets(recipe: Recipe, config: ExperimentConfig, train: TrainConfig, layer: str | None) -> Prompts:
    """Both sets, `config.prompts` each. Raises RecipeError where the dataset gives none."""
    if (world := world_of(recipe)) is not None:
        return {name: list(itertools.islice(_of_world(world, name), config.prompts)) for name in SETS}
    return _held_out(recipe, train, layer, config.prompts)


def world_of(recipe: Recipe) -> WorldSource | None:
    """The captioned world that the recipe's dataset is of, or None for any other."""
    if recipe.source is None or recipe.source.format != "world":
        return None
    return recipe.source.world or WorldSource()


def source_of(recipe: Recipe) -> dict[str, Any] | None:
    """What decides which prompts of the captioned world are asked; None for any other dataset."""
    world = world_of(recipe)
    return None if world is None else world.model_dump(mode="json")


def _of_world(world: WorldSource, name: str) -> Iterator[Prompt]:
    vocab = vocabulary(world)
    for index in itertools.count():
        scene = draw_scene(world.seed + _UNSEEN, index, vocab)
        if name == "original" and alt_kind(scene) not in _MEANT:
            continue
        text = alt(scene, vocab) if name == "original" else descriptive(scene)
        if wanted := read(text):
            yield Prompt(text, index, wanted=wanted, image=render(scene, world.size))


def _held_out(recipe: Recipe, train: TrainConfig, layer: str | None, count: int) -> Prompts:
    """The captions of the dataset's last samples, which `train.data.holdout` keeps from training."""
    if train.data.holdout < count:
        problem = f"holds back {train.data.holdout} samples, and {count} prompts are to come from them"
        raise RecipeError("train.data.holdout", problem, f"write holdout: {count}, or lower experiment.prompts")
    if layer is None:
        raise RecipeError("train.data.layer", "is null: there are no descriptive prompts", "name a caption layer")
    dataset = Dataset(Storage(recipe.dataset, recipe.storage))
    rows: list[dict[str, Any]] = []
    for shard in reversed(dataset.shard_names):
        captions = read_layer(dataset.storage, layer, shard)
        table = dataset.table(shard, ["key", "caption"]).to_pylist()
        rows[:0] = [{"original": row["caption"], **captions.get(row["key"], {})} for row in table]
        if len(rows) >= train.data.holdout:
            break
    rows = rows[-train.data.holdout :][:count]
    if lacking := sum("descriptive" not in row for row in rows):
        problem = f"layer {layer} describes all but {lacking} of the samples held out: it cannot give {count} prompts"
        raise RecipeError("experiment.prompts", problem, "name another layer, or fewer prompts")
    return {name: [Prompt(row[name], number) for number, row in enumerate(rows)] for name in SETS}
