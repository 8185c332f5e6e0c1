"""CMMD: MMD² of CLIP's embeddings of generated and true images

Jayasumana et al. 2024, “Rethinking FID” (arXiv:2401.09603): embeddings of length 1, a gaussian kernel of σ = 10, times
1000. Any open_clip model works; values compare only for one CLIP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch

from capstan.training.config.monitoring import ClipSettings
from capstan.training.metrics.clip_score import ClipScore
from capstan.training.metrics.metric import Total
from capstan.training.metrics.mmd import FeaturePair, gaussian, mmd2
from capstan.training.metrics.samples import EvalSet

_SCALE = 1000


class ClipDistance(ClipScore):
    """CMMD; the true images' embeddings are kept from one evaluation to the next."""

    name: ClassVar[str] = "cmmd"
    uses_prompts: ClassVar[bool] = False

    def __init__(self, model: ClipSettings, field: str) -> None:
        super().__init__(model, field)
        self.pair = FeaturePair()

    def check(self, eval_set: EvalSet) -> None:
        super().check(eval_set)
        self.pair.count = len(eval_set)

    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        self.pair.reset()
        with super().ready(device):
            yield

    def add(self, eval_set: EvalSet, numbers: Sequence[int], pictures: np.ndarray) -> None:
        self.pair.add(eval_set, numbers, pictures, self._embed)

    def _embed(self, images: np.ndarray) -> torch.Tensor:
        assert self.loaded is not None
        features: torch.Tensor = self.loaded.images(np.stack([self.tower.prepare(image) for image in images]))
        return torch.nn.functional.normalize(features, dim=-1)

    def result(self, total: Total) -> dict[str, float]:
        return {"cmmd": _SCALE * mmd2(*self.pair.whole(self.tower.dim, total), gaussian)}
