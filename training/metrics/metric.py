"""Interface of a metric of generated images, and those that a recipe names.

metric.check(eval_set)                       at the start of a run: is everything there that it needs?
with metric.ready(device):                   networks are loaded for one evaluation and released after it
    metric.add(eval_set, numbers, images)    each worker adds its share
    metric.result(total)                     the same on all workers; `total` sums a tensor over them
"""

from __future__ import annotations

import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.config.monitoring import Evaluate
from capstan.training.drawing.drawer import Drawn, Kind
from capstan.training.metrics.samples import EvalSet

Total = Callable[[torch.Tensor], torch.Tensor]  # one worker's CPU tensor → the sum over all workers


class Metric(ABC):
    """A metric; its sums are reset by `ready`."""

    name: ClassVar[str]  # as in `measures`
    kinds: ClassVar[frozenset[Kind]] = frozenset({"image", "scene"})  # that it can judge; scenes by their drawings
    uses_prompts: ClassVar[bool] = True  # whether the value depends on the prompts

    @abstractmethod
    def check(self, eval_set: EvalSet) -> None:
        """Raise RecipeError if a file, a package or the ground truth that it needs is missing."""

    @abstractmethod
    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        """Load the networks and reset the sums."""

    def seen(self, drawn: Drawn) -> np.ndarray:
        """Return what `add` judges of what was drawn, one per prompt; images by default."""
        return drawn.images

    def mismatched(self, images: np.ndarray) -> np.ndarray:
        """Return what is judged for chance, with other prompts: as it is, or with parts that belong to others."""
        return images

    def truth(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> np.ndarray:
        """Return what `add` judges of the truth: its images, as the best model of this kind would draw them."""
        return images

    def of_truth(self, eval_set: EvalSet, numbers: Sequence[int], side: int) -> np.ndarray:
        """Return what `add` judges of true samples, for metrics that compare two sets of them."""
        return eval_set.images(numbers, side)

    @abstractmethod
    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        """Add generated images, uint8 [N, H, W, 3], for the prompts `numbers`."""

    @abstractmethod
    def result(self, total: Total) -> dict[str, float]:
        """Return name → value; nan where no image has a defined value."""


class Means(Metric):
    """The mean of each of `measures` over what was judged, where it is defined (not nan)."""

    measures: ClassVar[Sequence[str]]
    prefix: ClassVar[str] = ""  # of the names in the result

    def __init__(self, field: str) -> None:
        self.field = field
        self._sums = torch.zeros(2, len(self.measures), dtype=torch.float64)  # sum of the values; their number

    @contextlib.contextmanager
    def ready(self, device: torch.device) -> Iterator[None]:
        self._sums.zero_()
        yield

    def count(self, scores: Mapping[str, float]) -> None:
        """Add the scores of one image, clip, sound or scene."""
        values = torch.tensor([scores[name] for name in self.measures], dtype=torch.float64)
        self._sums += torch.stack([values.nan_to_num(), (~values.isnan()).double()])

    def result(self, total: Total) -> dict[str, float]:
        values, counts = total(self._sums.clone())
        means = (values / counts).tolist()
        return {f"{self.prefix}{name}": mean for name, mean in zip(self.measures, means, strict=True)}


def make_metrics(wanted: Evaluate, field: str, kind: Kind = "image") -> list[Metric]:
    """Return the metrics named in `measures`, for what is drawn; `field` is the section's name, for errors."""
    from capstan.training.metrics.clip_score import ClipScore, FrameConsistency
    from capstan.training.metrics.clips import ClipOracle
    from capstan.training.metrics.cmmd import ClipDistance
    from capstan.training.metrics.fid import FrechetDistance, MediaDistance, SoundDistance
    from capstan.training.metrics.kid import KernelDistance
    from capstan.training.metrics.layout import LayoutScore
    from capstan.training.metrics.oracle import OracleScore
    from capstan.training.metrics.sounds import FilmOracle, SoundOracle
    from capstan.training.metrics.world import WorldLikeness

    metrics: list[Metric] = []
    for name in dict.fromkeys(wanted.measures or []):
        if name == "oracle":
            oracles: dict[str, Callable[[str], Metric]] = {"sound": SoundOracle, "clip": ClipOracle, "film": FilmOracle}
            metrics.append(oracles.get(kind, OracleScore)(f"{field}.measures"))
        elif name == "layout":
            metrics.append(LayoutScore(f"{field}.measures"))
        elif name == "world":
            metrics.append(WorldLikeness(f"{field}.measures"))
        elif name == "clip" and wanted.clip is not None:
            metrics.append(ClipScore(wanted.clip, f"{field}.clip"))
        elif name == "consistency" and wanted.clip is not None:
            metrics.append(FrameConsistency(wanted.clip, f"{field}.clip"))
        elif name == "fid" and wanted.fid is not None:
            distance = FrechetDistance if kind in ("image", "scene") else MediaDistance
            metrics.append(distance(wanted.fid, f"{field}.fid"))
        elif name == "fad" and wanted.fad is not None:
            metrics.append(SoundDistance(wanted.fad, f"{field}.fad"))
        elif name == "kid" and wanted.fid is not None:
            metrics.append(KernelDistance(wanted.kid, wanted.fid, f"{field}.fid"))
        elif name == "cmmd" and (judge := wanted.cmmd or wanted.clip) is not None:
            metrics.append(ClipDistance(judge, f"{field}.{'cmmd' if wanted.cmmd else 'clip'}"))
    return metrics


def check_kinds(metrics: Sequence[Metric], kind: Kind, field: str, *, prompted: bool = True) -> None:
    """Raise RecipeError if a metric cannot judge what the model draws; `field` is the list of metrics."""
    for metric in metrics:
        if metric.uses_prompts and not prompted:
            problem = f"{metric.name} compares images with prompts, and this model takes none"
            raise RecipeError(field, problem, f"remove {metric.name}; world, fid, kid and cmmd need no prompts")
        if kind not in metric.kinds:
            kinds = " and ".join(f"{one}s" for one in sorted(metric.kinds))
            problem = f"{metric.name} judges {kinds}, and this model draws {kind}s"
            raise RecipeError(field, problem, f"remove {metric.name}")


def single_worker(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`: the `total` of a single worker."""
    return tensor


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore all random generators and the number of threads on exit, so that training steps are not affected."""
    threads, python, numpy = torch.get_num_threads(), random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)
