"""A recipe → two sets of evaluation prompts.

As in the DALL-E 3 paper (section 3.1):

    original      captions as found with images
    descriptive   descriptions of images

On the captioned world both are of scenes that are in no dataset. Original captions are used if they are English and
mention something that can be checked in an image; descriptions are true. For any other dataset the prompts are captions
of held-out samples (`train.data.holdout`); their descriptions are written by the captioner.
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
from capstan.training.metrics.samples import world_of

SETS: Final = ("original", "descriptive")
UPSAMPLED: Final = "upsampled"  # the first set with expanded prompts; images are scored against the original ones
_UNSEEN: Final = 8_641_000_001  # added to the world's seed: no dataset and no `capstan evaluate` uses the sum
_MEANT: Final = ("fragment", "partial", "honest")  # kinds of alt text that are English and describe the image


@dataclass(frozen=True)
class Prompt:
    """A prompt and the seed of its noise; on the captioned world also its contents and its true image."""

    text: str  # the text that images are scored against
    seed: int
    drawn: str | None = None  # the expanded text that the model gets; None: `text`
    wanted: Wanted | None = None
    image: np.ndarray | None = None  # uint8 [side, side, 3]


Prompts = dict[str, list[Prompt]]  # set → prompts


def prompt_sets(recipe: Recipe, config: ExperimentConfig, train: TrainConfig, layer: str | None) -> Prompts:
    """Return both sets, `config.prompts` prompts each. Raises RecipeError if the dataset has too few."""
    if (world := world_of(recipe)) is not None:
        return {name: list(itertools.islice(world_prompts(world, name), config.prompts)) for name in SETS}
    return _held_out(recipe, train, layer, config.prompts)


def source_of(recipe: Recipe) -> dict[str, Any] | None:
    """Return the settings that determine the captioned world's prompts; None for any other dataset."""
    world = world_of(recipe)
    return None if world is None else world.model_dump(mode="json")


def world_prompts(world: WorldSource, name: str) -> Iterator[Prompt]:
    """Yield the prompts of a set, of scenes that are in no dataset, with their true images."""
    vocab = vocabulary(world)
    for index in itertools.count():
        scene = draw_scene(world.seed + _UNSEEN, index, vocab)
        if name == "original" and alt_kind(scene) not in _MEANT:
            continue
        text = alt(scene, vocab) if name == "original" else descriptive(scene)
        if wanted := read(text):
            yield Prompt(text, index, wanted=wanted, image=render(scene, world.size))


def _held_out(recipe: Recipe, train: TrainConfig, layer: str | None, count: int) -> Prompts:
    """Return captions of the dataset's last samples, which `train.data.holdout` excludes from training."""
    if train.data.holdout < count:
        problem = f"is {train.data.holdout}, but {count} prompts are needed from held-out samples"
        raise RecipeError("train.data.holdout", problem, f"set holdout: {count}, or lower experiment.prompts")
    if layer is None:
        raise RecipeError("train.data.layer", "is null, so there are no descriptive prompts", "set a caption layer")
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
        problem = f"layer {layer} has no description of {lacking} of the {len(rows)} held-out samples needed"
        raise RecipeError("experiment.prompts", problem, "use another layer, or fewer prompts")
    return {name: [Prompt(row[name], number) for number, row in enumerate(rows)] for name in SETS}
