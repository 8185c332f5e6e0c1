"""A run's log → the time its steps took, and how many steps a time allows

Only steps count: start-up, saving, drawing and measuring do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from capstan.training.run import whole_lines

_PROBE: Final = 20  # steps of a run whose speed is not known yet
_ENOUGH: Final = 0.96  # of the time: another start would cost more than it adds
_MOST: Final = 6  # pieces, after which the speed is said to be unsteady


@dataclass(frozen=True)
class Spent:
    """What a run's steps took so far."""

    steps: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0  # of all workers

    def seconds(self, clock: Literal["wall", "cpu"]) -> float:
        return self.cpu_s if clock == "cpu" else self.wall_s


def spent(folder: Path, batch: int) -> Spent:
    """Return what the steps in a run's log took; nothing for a run that has not started."""
    log = folder / "log.jsonl"
    if not log.exists():
        return Spent()
    step, wall, cpu = 0, 0.0, 0.0
    for _, record in whole_lines(log):
        steps = record["step"] - step
        step, wall, cpu = record["step"], wall + steps * batch / record["samples_per_s"], cpu + record.get("cpu_s", 0.0)
    return Spent(step, wall, cpu)


def train_for(
    seconds: float, clock: Literal["wall", "cpu"], measured: Callable[[], Spent], train_to: Callable[[int], None]
) -> Spent:
    """Train until the steps took `seconds`, in pieces whose length follows from the speed so far; return the total.

    `train_to(steps)` trains up to a step and returns when it is there.
    """
    for _ in range(_MOST):
        so_far = measured()
        used = so_far.seconds(clock)
        if used >= _ENOUGH * seconds:
            break
        speed = so_far.steps / used if used else 0.0
        more = math.ceil((seconds - used) * speed)
        if so_far.steps < _PROBE:
            more = _PROBE - so_far.steps
        train_to(so_far.steps + max(1, more))
    return measured()
