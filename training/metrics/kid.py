"""Kernel inception distance: MMD² of the features that FID compares, without FID's bias

Bińkowski et al. 2018, “Demystifying MMD GANs”: the mean over subsets of images, and the standard deviation
between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.config.monitoring import Fid, Kid
from capstan.training.metrics.fid import FrechetDistance
from capstan.training.metrics.metric import Total
from capstan.training.metrics.mmd import FeaturePair, polynomial, subsets_mmd2
from capstan.training.metrics.samples import EvalSet

_FEWEST = 4  # images: a subset is at most half of them, and needs two


class KernelDistance(FrechetDistance):
    """KID, by FID's network; the true images' features are kept from one evaluation to the next."""

    name: ClassVar[str] = "kid"

    def __init__(self, settings: Kid, network: Fid, field: str) -> None:
        super().__init__(network, field)
        self.settings = settings
        self.pair = FeaturePair()

    def check(self, eval_set: EvalSet) -> None:
        super().check(eval_set)
        self.pair.count = len(eval_set)

    def refuse_few_images(self, count: int) -> None:
        if count < _FEWEST:
            hint = f"set count (--count) to {_FEWEST} or more, better 1000"
            raise RecipeError(f"{self.section}.count", f"{count} images are too few for kid", hint)

    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        self.pair.reset()
        with super().ready(device):
            yield

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        self.pair.add(eval_set, numbers, images, self._features)

    def _features(self, images: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(self.metric.device)
            features: Any = self.metric.inception(tensor)
        return torch.as_tensor(features).reshape(len(images), -1)

    def result(self, total: Total) -> dict[str, float]:
        drawn, truth = self.pair.whole(len(self.metric.real_features_sum), total)
        size = self.settings.size or min(1000, len(drawn) // 2)
        size = min(size, len(drawn))
        mean, std = subsets_mmd2(drawn, truth, polynomial, self.settings.subsets, size)
        return {"kid": mean, "kid_std": std}
