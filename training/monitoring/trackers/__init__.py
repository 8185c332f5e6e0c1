"""Curves and images → TensorBoard, MLflow, W&B; one file per tracker."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from capstan.training.run import Run


class Tracker(Protocol):
    """A tracker, opened on rank 0 as `Tracker(run, step)`; values logged after `step` will be logged again."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers, each under its name, after `step` steps."""

    def image(self, step: int, name: str, file: Path) -> None:
        """Log a PNG file."""

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run as one; empty on workers other than rank 0."""

    def __init__(self, opened: Sequence[Tracker] = ()) -> None:
        self.opened = list(opened)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self.opened:
            tracker.scalars(step, values)

    def image(self, step: int, name: str, file: Path) -> None:
        for tracker in self.opened:
            tracker.image(step, name, file)

    def close(self) -> None:
        while self.opened:
            self.opened.pop().close()


def open_trackers(run: Run, step: int) -> Trackers:
    """Open the trackers that the recipe names. Raises MissingExtra if the package of one is not installed."""
    opened: list[Any] = []
    for name in dict.fromkeys(run.train.watch.trackers):
        module = importlib.import_module(f"capstan.training.monitoring.trackers.{name}")
        opened.append(module.Tracker(run, step))
    return Trackers(opened)
