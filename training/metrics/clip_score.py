"""CLIP score: the cosine of an image and its prompt; and frame consistency: that of neighbouring frames.

Hessel et al. 2021, CLIPScore, without its factor 2.5; Esser et al. 2023, Gen-1, section 4.2, frame consistency. Any
open_clip model works, from a folder or a file; it is loaded as in scoring (pipeline.score.clip_model).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.clip_model import ClipModel, Loaded
from capstan.training.config.monitoring import ClipSettings
from capstan.training.drawing.drawer import Kind
from capstan.training.metrics.metric import Metric, Total
from capstan.training.metrics.samples import EvalSet


class ClipScore(Metric):
    """The mean CLIP score over all images."""

    name: ClassVar[str] = "clip"

    def __init__(self, model: ClipSettings, field: str) -> None:
        self.tower, self.field = ClipModel(model.model, model.pretrained, "fp32", field), field
        self.loaded: Loaded | None = None
        self.sums = torch.zeros(2, dtype=torch.float64)  # sum of the cosines; their number

    def check(self, eval_set: EvalSet) -> None:
        if not self.tower.file.is_file():
            problem = f"{self.tower.file} is not on this machine"
            raise RecipeError(f"{self.field}.pretrained", problem, "copy it to a folder that all machines can read")

    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        self.sums.zero_()
        self.loaded = self.tower.load(str(device), threads=torch.get_num_threads())
        try:
            yield
        finally:
            self.loaded = None

    def add(self, eval_set: EvalSet, numbers: Sequence[int], pictures: np.ndarray) -> None:
        assert self.loaded is not None
        image_features = self.loaded.images(np.stack([self.tower.prepare(image) for image in pictures]))
        text_features = self.loaded.texts(eval_set.prompts(numbers))
        cosines = torch.nn.functional.cosine_similarity(image_features, text_features).double().cpu()
        self.sums += torch.stack([cosines.sum(), torch.tensor(float(len(cosines)), dtype=torch.float64)])

    def result(self, total: Total) -> dict[str, float]:
        value, count = total(self.sums.clone()).tolist()
        return {"clip": value / count}


class FrameConsistency(ClipScore):
    """The mean cosine of CLIP's embeddings of neighbouring frames. Chance: frames of other clips follow each other."""

    name: ClassVar[str] = "consistency"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"clip", "film"})

    def mismatched(self, images: np.ndarray) -> np.ndarray:
        """Return clips whose frame f is that of the clip f places further on."""
        clips, count = frames_of(images), len(images)
        return np.stack([[clips[(n + f) % count][f] for f in range(len(clips[n]))] for n in range(count)])

    def add(self, eval_set: EvalSet, numbers: Sequence[int], pictures: np.ndarray) -> None:
        """Add clips, uint8 [N, frames, H, W, 3], or films of such clips."""
        assert self.loaded is not None
        clips = frames_of(pictures)
        prepared = np.stack([self.tower.prepare(frame) for frames in clips for frame in frames])
        features = torch.nn.functional.normalize(self.loaded.images(prepared), dim=-1).double().cpu()
        features = features.unflatten(0, clips.shape[:2])
        cosines = (features[:, 1:] * features[:, :-1]).sum(-1).mean(1)
        self.sums += torch.stack([cosines.sum(), torch.tensor(float(len(cosines)), dtype=torch.float64)])

    def result(self, total: Total) -> dict[str, float]:
        return {"consistency": super().result(total)["clip"]}


def frames_of(images: np.ndarray) -> np.ndarray:
    """Return clips, or the clips of films, as uint8 [N, frames, H, W, 3]."""
    return np.stack([film[0] for film in images]) if images.dtype == object else images
