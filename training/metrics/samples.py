"""What images are drawn of while a run is measured: prompts that it does not train on, each with a true image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

import numpy as np

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.captions import descriptive
from capstan.pipeline.world.render import render
from capstan.pipeline.world.scene import Scene, draw_scene, vocabulary
from capstan.training.config import Data, TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.data.transforms import square
from capstan.training.run_data import open_storage, shares

_UNSEEN: Final = 7_919_000_003  # added to the world's seed


class EvalSet(ABC):
    """Prompts by number, 0 … len − 1, and what they describe."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def prompts(self, numbers: Sequence[int]) -> list[str]: ...

    @abstractmethod
    def images(self, numbers: Sequence[int], side: int) -> np.ndarray:
        """The true images, uint8 [N, side, side, 3]."""


class Scenes(EvalSet):
    """Scenes of the captioned world that no run has seen: their seed is none that a dataset is drawn from."""

    def __init__(self, world: WorldSource, count: int) -> None:
        self.world = world
        self.scenes: list[Scene] = [
            draw_scene(world.seed + _UNSEEN, number, vocabulary(world)) for number in range(count)
        ]

    def __len__(self) -> int:
        return len(self.scenes)

    def prompts(self, numbers: Sequence[int]) -> list[str]:
        return [descriptive(self.scenes[number]) for number in numbers]

    def images(self, numbers: Sequence[int], side: int) -> np.ndarray:
        return np.stack([render(self.scenes[number], side) for number in numbers])


class HeldOut(EvalSet):
    """The samples of `train.data.holdout`, from the first on."""

    def __init__(self, data: TrainingData, count: int) -> None:
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def prompts(self, numbers: Sequence[int]) -> list[str]:
        return [self.data.sample(len(self.data) + number).text for number in numbers]

    def images(self, numbers: Sequence[int], side: int) -> np.ndarray:
        return np.stack([square(self.data.sample(len(self.data) + number).jpeg, side) for number in numbers])


def subjects_of(recipe: Recipe, train: TrainConfig, layer: str | None, count: int, field: str) -> EvalSet:
    """`count` subjects: unseen scenes where the dataset is the captioned world, else held-out samples.

    Raises RecipeError where too few samples are held out; `field` is what asks for so many.
    """
    if (world := world_of(recipe)) is not None:
        return Scenes(world, count)
    if train.data.holdout < count:
        problem = f"wants {count} samples that are not trained on, and train.data.holdout is {train.data.holdout}"
        raise RecipeError(field, problem, f"write train.data.holdout: {count} in a new run, or ask for fewer")
    images = Data(layer=train.data.layer, blend=train.data.blend, holdout=train.data.holdout)  # and no latents
    dataset = Dataset(open_storage(recipe, shares(recipe, train)[0]))
    return HeldOut(TrainingData(dataset, images, train.seed, layer=layer), count)


def world_of(recipe: Recipe) -> WorldSource | None:
    """The captioned world that the recipe's dataset is drawn from, if it is."""
    if recipe.source is None or recipe.source.format != "world":
        return None
    return recipe.source.world or WorldSource()
