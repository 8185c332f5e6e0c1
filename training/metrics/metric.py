"""What a judge of drawn images is, and those that a recipe names.

judge.check()                                     when a run begins: is all there that it needs?
with judge.ready(device):                         its networks, loaded for one evaluation and let go after it
    judge.add(subjects, numbers, images)        each worker its share
    judge.result(total)                           the same on all workers; `total` sums a tensor over them
"""

from __future__ import annotations

import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch

from capstan.training.config.monitoring import Evaluate
from capstan.training.metrics.samples import EvalSet

Total = Callable[[torch.Tensor], torch.Tensor]  # a CPU tensor of one worker → the sum over all


class Metric(ABC):
    """One measure; what it has added up is forgotten when it is made ready again."""

    knows_prompts: ClassVar[bool] = True  # whether it tells images of a prompt from those of another

    @abstractmethod
    def check(self, subjects: EvalSet) -> None:
        """Raises RecipeError where a file, a package or the truth that it needs is missing."""

    @abstractmethod
    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        """Have what it needs loaded, and nothing added up yet."""

    @abstractmethod
    def add(self, subjects: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        """Take in what was drawn, uint8 [N, H, W, 3], for the prompts of these numbers."""

    @abstractmethod
    def result(self, total: Total) -> dict[str, float]:
        """name → value, nan where nothing was defined."""


def judges_of(wanted: Evaluate, field: str) -> list[Metric]:
    """The judges of `measures`; `field` is the section's name, for errors."""
    from capstan.training.metrics.clip_score import ClipScore
    from capstan.training.metrics.fid import FrechetDistance
    from capstan.training.metrics.oracle import Follows

    judges: list[Metric] = []
    for name in dict.fromkeys(wanted.measures):
        if name == "oracle":
            judges.append(Follows(f"{field}.measures"))
        elif name == "clip" and wanted.clip is not None:
            judges.append(ClipScore(wanted.clip, f"{field}.clip"))
        elif name == "fid" and wanted.fid is not None:
            judges.append(FrechetDistance(wanted.fid, f"{field}.fid"))
    return judges


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The `total` of a single worker."""
    return tensor


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leave all randomness and the number of threads as they were: what happens inside changes no step."""
    threads, python, numpy = torch.get_num_threads(), random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)
