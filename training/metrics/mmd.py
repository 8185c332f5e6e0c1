"""Maximum mean discrepancy: how far apart two sets of features are, without bias (Gretton et al. 2012, eq. 3)

    MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y)      over pairs of different images

It is 0 on average if both sets are drawn from one distribution, however few they are, and may then be below 0. A
Fréchet distance of so few images is mostly bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from capstan.training.metrics.metric import Total
from capstan.training.metrics.samples import EvalSet

Features = Callable[[np.ndarray], torch.Tensor]  # uint8 images [N, H, W, 3] → [N, F]
Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # [N, F], [M, F] → [N, M]

_ROWS = 1024  # of a kernel matrix that are held at once


def polynomial(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return (x·y / F + 1)³, KID's kernel (Bińkowski et al. 2018, arXiv:1801.01401, eq. 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: torch.Tensor, y: torch.Tensor, sigma: float = 10.0) -> torch.Tensor:
    """Return exp(−‖x − y‖² / 2σ²), CMMD's kernel (Jayasumana et al. 2024, arXiv:2401.09603, section 4)."""
    distances = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(-distances / (2 * sigma**2))


def mmd2(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> float:
    """Return the unbiased estimate of MMD² between features x [N, F] and y [M, F], N and M at least 2."""
    x, y = x.double(), y.double()
    return _among(x, kernel) + _among(y, kernel) - 2 * _between(x, y, kernel)


def _between(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> float:
    return sum(float(kernel(part, y).sum()) for part in x.split(_ROWS)) / (len(x) * len(y))


def _among(x: torch.Tensor, kernel: Kernel) -> float:
    count = len(x)
    every = sum(float(kernel(part, x).sum()) for part in x.split(_ROWS))
    same = sum(float(kernel(row, row)) for row in x.split(1))
    return (every - same) / (count * (count - 1))


def subsets_mmd2(x: torch.Tensor, y: torch.Tensor, kernel: Kernel, subsets: int, size: int) -> tuple[float, float]:
    """Return mean and standard deviation of MMD² over `subsets` pairs of `size` features, always the same ones."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(subsets):
        mine, theirs = (torch.from_numpy(rng.permutation(len(part))[:size]) for part in (x, y))
        values.append(mmd2(x[mine], y[theirs], kernel))
    return float(np.mean(values)), float(np.std(values))


class FeatureRows:
    """The features of a worker's images, by number."""

    def __init__(self) -> None:
        self.rows: dict[int, torch.Tensor] = {}

    def add(self, numbers: list[int], features: torch.Tensor) -> None:
        """Add features [N, F] of the images `numbers`."""
        self.rows |= dict(zip(numbers, features.detach().double().cpu(), strict=True))

    def whole(self, count: int, width: int, total: Total) -> torch.Tensor:
        """Return the features of all images, float64 [count, width]; the same on all workers."""
        mine = torch.zeros(count, width, dtype=torch.float64)
        for number, row in self.rows.items():
            mine[number] = row
        return total(mine)


class FeaturePair:
    """The features of drawn images and of the true ones; the latter are kept from one evaluation to the next."""

    def __init__(self) -> None:
        self.count = 0  # images in all, over all workers
        self.truth: torch.Tensor | None = None  # [count, F]
        self.reset()

    def reset(self) -> None:
        """Forget the drawn images, for another evaluation."""
        self._drawn, self._true = FeatureRows(), FeatureRows()

    def add(self, eval_set: EvalSet, numbers: Sequence[int], drawn: np.ndarray, features: Features) -> None:
        """Add the features of drawn images, and of the true ones of these numbers."""
        self.count = len(eval_set)
        self._drawn.add(list(numbers), features(drawn))
        if self.truth is None:
            self._true.add(list(numbers), features(eval_set.images(numbers, drawn.shape[1])))

    def whole(self, width: int, total: Total) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features of all drawn and of all true images [count, width]; the same on all workers."""
        if self.truth is None:
            self.truth = self._true.whole(self.count, width, total)
        return self._drawn.whole(self.count, width, total), self.truth
