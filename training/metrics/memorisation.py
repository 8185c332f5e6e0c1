"""Memorisation: drawn images that copy an image of the training set, by copy descriptors

    drawn images ──▶ descriptors ──▶ the nearest training image of each ──▶ the share at or above the threshold

The same descriptors find duplicates in a dataset (`dedup.copies`). Training images are described one by one and not
kept: memory does not grow with the dataset.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from capstan.pipeline.config import CopyDetection, Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.progress import Progress
from capstan.pipeline.score.descriptors import Descriptor
from capstan.training.config import Data, TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.data.sources import open_storage, weighted_datasets
from capstan.training.data.transforms import square
from capstan.training.metrics.samples import EvalSet

_TOGETHER = 64  # training images described before they are compared
_PAIRS = 16  # pairs listed, nearest first

Described = np.ndarray  # float32 [N, dim], of length 1; zeros for an image without a descriptor


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each of N images: its cosine, and where it is (`Memorisation.image`)."""

    cosine: np.ndarray  # float32 [N]; -1 for an image without a descriptor
    place: np.ndarray  # int64 [N, 2]: dataset, index


class Memorisation:
    """Compares drawn images with everything that a run was trained on.

    Raises RecipeError for a network that does not fit, before anything is drawn; `field` names it in errors.
    """

    def __init__(self, recipe: Recipe, copies: CopyDetection, field: str) -> None:
        self.copies, self.descriptor = copies, Descriptor(copies, field)
        self.dim = self.descriptor.dim
        train = TrainConfig.from_recipe(recipe)
        data = Data(holdout=train.data.holdout)  # without latents
        sources = weighted_datasets(recipe, train)
        self.trained = [
            TrainingData(Dataset(open_storage(recipe, source)), data, train.seed, layer=None) for source in sources
        ]

    @property
    def total(self) -> int:
        """Number of training images."""
        return sum(map(len, self.trained))

    def measure(
        self, images: np.ndarray, prompts: Sequence[str], subjects: EvalSet
    ) -> tuple[dict[str, float], dict[str, Any], list[tuple[np.ndarray, str]]]:
        """Measure drawn images uint8 [N, side, side, 3] next to the true images of the same prompts.

        Returns the share of copies (`value`; `chance`: of true images, which the run has not seen), the nearest pairs
        for evaluation.json, and the images of these pairs with their labels, drawn and trained on in turn.
        """
        side = images.shape[1]
        true = subjects.images(range(len(subjects)), side)
        found = self.nearest(np.concatenate([self.describe(images), self.describe(true)]), side)
        threshold = self.copies.threshold
        copied, of_true = (found.cosine >= threshold).reshape(2, -1).mean(axis=1).tolist()
        pairs, shown = [], list[tuple[np.ndarray, str]]()
        for number in np.argsort(-found.cosine[: len(images)], kind="stable")[:_PAIRS].tolist():
            cosine, (source, index) = round(float(found.cosine[number]), 4), found.place[number].tolist()
            sample = self.trained[source].sample(index)
            pairs.append({"image": number, "prompt": prompts[number], "key": sample.key, "cosine": cosine})
            shown += [(images[number], f"{cosine:.2f} {prompts[number]}"), (square(sample.jpeg, side), sample.text)]
        settings = self.copies.model_dump(mode="json", include={"model", "threshold"})
        facts = {**settings, "training_images": self.total, "pairs": pairs}
        return {"value": copied, "chance": of_true}, facts, shown

    def nearest(self, described: Described, side: int) -> Nearest:
        """Compare images with all training images, each scaled and cropped to `side` as in training."""
        best = np.full(len(described), -1, np.float32)
        place = np.zeros((len(described), 2), np.int64)
        there = described.any(axis=1)
        with Progress("copies", self.total, unit="images") as bar:
            for source, data in enumerate(self.trained):
                for start in range(0, len(data), _TOGETHER):
                    indices = range(start, min(start + _TOGETHER, len(data)))
                    seen = self.describe(square(data.sample(index).jpeg, side) for index in indices)
                    cosines = described @ seen.T
                    at = cosines.argmax(axis=1)
                    nearer = there & (cosines.max(axis=1) > best)
                    best[nearer] = cosines.max(axis=1)[nearer]
                    place[nearer] = np.stack([np.full(len(at), source), start + at], axis=1)[nearer]
                    bar.advance(len(indices))
        return Nearest(best, place)

    def describe(self, images: Iterable[np.ndarray]) -> Described:
        """Describe images uint8 [height, width, 3], on all cores; the values do not depend on their number."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return np.stack(list(_described(pool, self.descriptor, images)))


def _described(pool: ThreadPoolExecutor, descriptor: Descriptor, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    def one(image: np.ndarray) -> np.ndarray:
        try:
            return descriptor(np.ascontiguousarray(image))
        except ValueError:  # a plain image may have none: it is near nothing
            return np.zeros(descriptor.dim, np.float32)

    return pool.map(one, images)
