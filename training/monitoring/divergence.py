"""End a run whose loss is not finite or stays far above its median.

Each worker writes the keys of its samples of those steps into the run folder:

bad-step-000123-worker-00000.json         {step, loss, grad_norm, not_finite: [parts], keys}
diverged-step-000123-worker-00000.json    {step, loss, median, steps: [{step, loss, keys}, ...]}
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch

from capstan.pipeline.errors import CapstanError
from capstan.pipeline.storage import Storage
from capstan.training.config import Diverged
from capstan.training.distributed.engine import Engine
from capstan.training.run import Run

_WINDOW: Final = 200  # losses that the median is taken over
_FIRST: Final = 20  # losses needed before one can count as high


class _Step(NamedTuple):
    """A step whose values may still be on the device."""

    step: int
    keys: list[str]
    loss: torch.Tensor
    norm: torch.Tensor | float
    finite: Mapping[str, torch.Tensor]  # part → 0-d tensor


class Divergence:
    """Detector of losses that stay high for too many steps. Its answer is the same on all workers.

    A loss is high if it is above `factor` × the median of the last losses that were not high. If the median is 0 or
    below (a loss with an adversarial part), no loss is high.

    >>> watched = Divergence(Diverged(factor=3, steps=2))
    >>> [watched.add(loss) for loss in [1.0] * 20 + [9.0, 1.0, 9.0, 9.0]][-4:]
    [False, False, False, True]
    """

    def __init__(self, limits: Diverged | None) -> None:
        self.limits = limits
        self.losses, self.high = deque[float](maxlen=_WINDOW), 0

    @property
    def median(self) -> float:
        return statistics.median(self.losses) if len(self.losses) >= _FIRST else 0.0

    def add(self, loss: float) -> bool:
        if self.limits is None:
            return False
        if 0 < self.limits.factor * self.median < loss:
            self.high += 1
        else:
            self.losses.append(loss)
            self.high = 0
        return self.high >= self.limits.steps

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "high": self.high}

    def restore(self, state: dict[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.high = int(state["high"])


class DivergenceMonitor:
    """Checker of every step, one step late, so that it never waits for a GPU."""

    def __init__(self, engine: Engine, run: Run) -> None:
        self.engine, self.run = engine, run
        limits = run.train.diverged
        self.divergence = Divergence(limits)
        self._due: deque[_Step] = deque()
        self._seen: deque[dict[str, Any]] = deque(maxlen=limits.steps if limits else 1)

    def add(
        self,
        step: int,
        keys: list[str],
        loss: torch.Tensor,
        norm: torch.Tensor | float | None,
        finite: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Record a step: keys of this worker's share of the batch, its mean loss, the norm of the whole gradient.

        `finite`: the model's parts in the order in which they compute, and whether their outputs were finite.
        """
        scale = self.engine.loss_scale
        excused = self.engine.skipped and scale is not None and not scale.exhausted
        self._due.append(_Step(step, keys, loss, 0.0 if norm is None or excused else norm, finite))

    def check(self, stop: bool, everything: bool) -> bool:
        """Return whether any worker requests a stop; called on every worker after every step.

        Before a stop, and if `everything` is set, the last step is checked too: a saved state must be sound.
        Raises CapstanError if a step was not sound, after writing the keys.
        """
        late = len(self._due) if everything else len(self._due) - 1
        (stopping,) = self._check_oldest(max(0, late), float(stop))
        if stopping and self._due:
            self._check_oldest(len(self._due))
        return stopping > 0

    def _check_oldest(self, count: int, *extra: float) -> list[float]:
        """Check the oldest `count` steps of all workers together; return the sums of `extra` over the workers."""
        due = [self._due.popleft() for _ in range(count)]
        mine = [(float(step.loss), float(step.norm)) for step in due]
        sums = self.engine.sums([*extra, *(value for pair in mine for value in pair)])
        for index, (step, keys, _, _, finite) in enumerate(due):
            loss, norm = sums[len(extra) + 2 * index :][:2]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._not_finite(step, keys, *mine[index], finite)
            self._seen.append({"step": step, "loss": mine[index][0], "keys": keys})
            if self.divergence.add(loss / self.engine.world):
                raise self._diverged(step, loss / self.engine.world)
        return sums[: len(extra)]

    def _not_finite(
        self, step: int, keys: list[str], loss: float, norm: float, finite: Mapping[str, torch.Tensor]
    ) -> CapstanError:
        parts = [name for name, flag in finite.items() if not flag]
        content = {"step": step, "loss": repr(loss), "grad_norm": repr(norm), "not_finite": parts, "keys": keys}
        files = self._write(f"bad-step-{step:06d}", content)
        bad = {name for of_worker in self.engine.collect(parts) for name in of_worker}
        first = next((name for name in finite if name in bad), None)  # the others compute with its output
        source = f"{first} returned values that are not finite" if first else "every part returned finite values"
        return CapstanError(
            f"training: the loss or the gradient is not finite at step {step}: {source}; the keys of its batch are in "
            f"{files}. Fix: lower train.lr, or check those images"
        )

    def _diverged(self, step: int, loss: float) -> CapstanError:
        limits, median = self.divergence.limits, self.divergence.median
        assert limits is not None
        content = {"step": step, "loss": loss, "median": median, "steps": list(self._seen)}
        files = self._write(f"diverged-step-{step:06d}", content)
        return CapstanError(
            f"training: the loss diverges: at step {step} it is {loss:.4g}, and for {limits.steps} steps it has been "
            f"above {limits.factor:g} × its median, {median:.4g}; the keys of those batches are in {files}. "
            "Fix: lower train.lr, or set train.diverged"
        )

    def _write(self, name: str, content: dict[str, Any]) -> str:
        file = f"{name}-worker-{self.engine.rank:05d}.json"
        Storage(str(self.run.folder)).write(file, json.dumps(content, indent=1).encode())
        self.engine.wait()  # else the first worker to end would stop the others before they have written their files
        return f"{self.run.folder}/{name}-*.json"
