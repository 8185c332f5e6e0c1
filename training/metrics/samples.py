"""Evaluation prompts that a run does not train on, each with a true image."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.captions import descriptive
from capstan.pipeline.world.render import render
from capstan.pipeline.world.scene import Scene, draw_scene, vocabulary
from capstan.pipeline.world.table import truth_of
from capstan.training.config import Data, TrainConfig
from capstan.training.config.families import traits_of
from capstan.training.data.clips import clips_of
from capstan.training.data.dataset import TrainingData
from capstan.training.data.films import film_of
from capstan.training.data.sounds import Form, batch_of, pieces_of, to_wave
from capstan.training.data.sources import open_storage, weighted_datasets
from capstan.training.data.transforms import square

_UNSEEN: Final = 7_919_000_003  # added to the world's seed: no dataset is generated from the sum


class EvalSet(ABC):
    """Prompts by number, 0 … len − 1, and the images that they describe."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def prompts(self, numbers: Sequence[int]) -> list[str]: ...

    @abstractmethod
    def images(self, numbers: Sequence[int], side: int) -> np.ndarray:
        """Return the true images, uint8 [N, side, side, 3]."""

    def sounds(self, numbers: Sequence[int], form: Form) -> np.ndarray:
        """Return the true sounds, float32 [N, values, channels]. Raises RecipeError if there are none."""
        raise RecipeError("dataset", "it has no sounds to compare with", "name a run that was trained on sounds")

    def clips(self, numbers: Sequence[int], frames: int, fps: float, side: int) -> np.ndarray:
        """Return the true clips, uint8 [N, frames, side, side, 3]. Raises RecipeError if there are none."""
        raise RecipeError("dataset", "it has no clips to compare with", "name a run that was trained on clips")

    def films(self, numbers: Sequence[int], frames: int, fps: float, side: int, form: Form) -> np.ndarray:
        """Return the true clips with their sounds [N]: (uint8 [frames, side, side, 3], float32 [values, channels])."""
        raise RecipeError(
            "dataset", "it has no clips with sound to compare with", "name a run that was trained on them"
        )

    def columns(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return the further columns of the true samples, such as `objects`; empty if nothing is known."""
        return [{} for _ in numbers]


class Scenes(EvalSet):
    """Scenes of the captioned world that no run has seen; their seed is never used for a dataset."""

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

    def columns(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [truth_of(self.scenes[number]) for number in numbers]


class HeldOut(EvalSet):
    """The first `count` samples of `train.data.holdout`."""

    def __init__(self, data: TrainingData, count: int) -> None:
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def prompts(self, numbers: Sequence[int]) -> list[str]:
        return [self.data.sample(len(self.data) + number).text for number in numbers]

    def images(self, numbers: Sequence[int], side: int) -> np.ndarray:
        return np.stack([square(self.data.sample(len(self.data) + number).jpeg, side) for number in numbers])

    def sounds(self, numbers: Sequence[int], form: Form) -> np.ndarray:
        pieces = pieces_of([self.data.sample(len(self.data) + number) for number in numbers], form)
        return to_wave(batch_of(pieces)).permute(0, 2, 1).numpy()

    def clips(self, numbers: Sequence[int], frames: int, fps: float, side: int) -> np.ndarray:
        samples = [self.data.sample(len(self.data) + number) for number in numbers]
        return clips_of(samples, frames, fps, (side, side))[0].transpose(0, 1, 3, 4, 2)

    def films(self, numbers: Sequence[int], frames: int, fps: float, side: int, form: Form) -> np.ndarray:
        made = np.empty(len(numbers), dtype=object)
        for place, number in enumerate(numbers):
            shown, sound = film_of(self.data.sample(len(self.data) + number), frames, fps, (side, side), form)
            made[place] = shown, to_wave(torch.from_numpy(sound)).numpy()
        return made

    def columns(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        columns = [json.loads(self.data.sample(len(self.data) + number).extra) for number in numbers]
        return [
            one | {"objects": json.loads(one["objects"])} if isinstance(one.get("objects"), str) else one
            for one in columns
        ]


def make_eval_set(recipe: Recipe, train: TrainConfig, layer: str | None, count: int, field: str) -> EvalSet:
    """Return `count` prompts: of unseen scenes if the dataset is the captioned world, else of held-out samples.

    Raises RecipeError if too few samples are held out; `field` is the setting that requests `count`.
    """
    if (world := world_of(recipe)) is not None:
        return Scenes(world, count)
    if train.data.holdout < count:
        problem = f"needs {count} samples that are not trained on, and train.data.holdout is {train.data.holdout}"
        raise RecipeError(field, problem, f"set train.data.holdout: {count} in a new run, or request fewer")
    images = Data(layer=train.data.layer, blend=train.data.blend, holdout=train.data.holdout)  # without latents
    dataset = Dataset(open_storage(recipe, weighted_datasets(recipe, train)[0]))
    parts = dict.fromkeys(["jpg", *traits_of(train.model).reads])
    return HeldOut(TrainingData(dataset, images, train.seed, layer=layer, parts=tuple(parts)), count)


def world_of(recipe: Recipe) -> WorldSource | None:
    """Return the captioned world that the dataset is generated from, or None for any other dataset."""
    if recipe.source is None or recipe.source.format != "world":
        return None
    return recipe.source.world or WorldSource()
