"""Is the training well? A loss that is not finite, or that stays far above what it was, ends the run.

The keys of the samples that were seen then are written into the run folder, by each worker its own:

bad-step-000123-worker-00000.json         {step, loss, grad_norm, keys}
diverged-step-000123-worker-00000.json    {step, loss, median, steps: [{step, loss, keys}, ...]}
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from typing import Any, Final

import torch

from capstan.pipeline.errors import CapstanError
from capstan.pipeline.storage import Storage
from capstan.training.config import Diverged
from capstan.training.distributed.engine import Engine
from capstan.training.run import Run

_WINDOW: Final = 200  # losses, of which the median is taken
_FIRST: Final = 20  # losses that have to be known before one can be called high


class Divergence:
    """Losses of one step after the other → whether they have been high for too long. The same on all workers.

    High is a loss above `factor` × the median of the last losses that were not. Medians of 0 and below tell nothing (a
    loss with an adversarial part), and then none is.

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
    """Looks at every step, one step late, so that a GPU is never waited for."""

    def __init__(self, engine: Engine, run: Run) -> None:
        self.engine, self.run = engine, run
        limits = run.train.diverged
        self.divergence = Divergence(limits)
        self._due: deque[tuple[int, list[str], torch.Tensor, Any]] = deque()
        self._seen: deque[dict[str, Any]] = deque(maxlen=limits.steps if limits else 1)

    def add(self, step: int, keys: list[str], loss: torch.Tensor, norm: torch.Tensor | float | None) -> None:
        """A step was made: the keys of this worker's share of the batch, its mean loss, the whole gradient's norm."""
        scale = self.engine.loss_scale
        excused = self.engine.skipped and scale is not None and not scale.exhausted
        self._due.append((step, keys, loss, 0.0 if norm is None or excused else norm))

    def check(self, stop: bool, everything: bool) -> bool:
        """Whether any worker asks for a stop; called on every worker after every step.

        Before a stop, and where `everything` says so, the last step is looked at too: what is saved must be well.
        Raises CapstanError where a step was not, once the keys are written.
        """
        late = len(self._due) if everything else len(self._due) - 1
        (stopping,) = self._look(max(0, late), float(stop))
        if stopping and self._due:
            self._look(len(self._due))
        return stopping > 0

    def _look(self, count: int, *asked: float) -> list[float]:
        """Look at the oldest `count` steps of all workers together; gives the sums of what was `asked` as well."""
        due = [self._due.popleft() for _ in range(count)]
        mine = [(float(loss), float(norm)) for _, _, loss, norm in due]
        sums = self.engine.sums([*asked, *(value for pair in mine for value in pair)])
        for index, (step, keys, _, _) in enumerate(due):
            loss, norm = sums[len(asked) + 2 * index :][:2]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._not_finite(step, keys, *mine[index])
            self._seen.append({"step": step, "loss": mine[index][0], "keys": keys})
            if self.divergence.add(loss / self.engine.world):
                raise self._diverged(step, loss / self.engine.world)
        return sums[: len(asked)]

    def _not_finite(self, step: int, keys: list[str], loss: float, norm: float) -> CapstanError:
        content = {"step": step, "loss": repr(loss), "grad_norm": repr(norm), "keys": keys}
        files = self._write(f"bad-step-{step:06d}", content)
        return CapstanError(
            f"training: the loss or the gradient is not finite at step {step}; the keys of its batch are in "
            f"{files}. Lower train.lr, or look at those images"
        )

    def _diverged(self, step: int, loss: float) -> CapstanError:
        limits, median = self.divergence.limits, self.divergence.median
        assert limits is not None
        content = {"step": step, "loss": loss, "median": median, "steps": list(self._seen)}
        files = self._write(f"diverged-step-{step:06d}", content)
        return CapstanError(
            f"training: the loss diverges: at step {step} it is {loss:.4g}, and for {limits.steps} steps it has been "
            f"above {limits.factor:g} × its median, {median:.4g}; the keys of those batches are in {files}. "
            "Lower train.lr, or set train.diverged"
        )

    def _write(self, name: str, content: dict[str, Any]) -> str:
        file = f"{name}-worker-{self.engine.rank:05d}.json"
        Storage(str(self.run.folder)).write(file, json.dumps(content, indent=1).encode())
        self.engine.wait()  # or the first to end would take the others with it before they have written theirs
        return f"{self.run.folder}/{name}-*.json"
