"""Where a run's curves and images go besides its own folder; one file a tracker, named by `train.watch.trackers`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from capstan.training.run import Run


class Tracker(Protocol):
    """Opened on rank 0 as `Tracker(run, step)`: what it was told after `step` is told again."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after `step` steps, each under its name."""

    def image(self, step: int, name: str, file: Path) -> None:
        """A PNG."""

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run as one; none on workers other than rank 0."""

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
    """The trackers that the recipe names. Raises MissingExtra where one's package is not installed."""
    opened: list[Any] = []
    for name in dict.fromkeys(run.train.watch.trackers):
        module = importlib.import_module(f"capstan.training.monitoring.trackers.{name}")
        opened.append(module.Tracker(run, step))
    return Trackers(opened)
