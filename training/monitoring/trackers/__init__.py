"""Curves and images → TensorBoard, MLflow, W&B; one file per tracker.

Order: tensorboard, mlflow, wandb (clients, all alike) → delivery (in the background, through outages).
A client's file has `require(field)`, which raises MissingExtra, `rejects(error)`, and the class
`Tracker(subject, step)`.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capstan.training.monitoring.trackers.delivery import Delivery
from capstan.training.monitoring.trackers.subject import Subject
from capstan.training.run import Run


class Trackers:
    """All trackers of a run as one; empty on workers other than rank 0. No outage of a tracker raises an error."""

    def __init__(self, folder: Path | None = None, deliveries: Sequence[Delivery] = ()) -> None:
        self._folder, self._deliveries = folder, deliveries

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers, each under its name, after `step` steps."""
        self._add({"step": step, "time": time.time(), "scalars": dict(values)})

    def notes(self, step: int, values: Mapping[str, str]) -> None:
        """Keep texts, each under its name; a later one replaces an earlier one."""
        self._add({"step": step, "time": time.time(), "notes": dict(values)})

    def image(self, step: int, name: str, file: Path) -> None:
        """Log a PNG file."""
        if self._folder is not None:
            path, folder = file.absolute(), self._folder.absolute()
            inside = path.relative_to(folder) if path.is_relative_to(folder) else path  # a run folder may be moved
            self._add({"step": step, "time": time.time(), "image": name, "file": str(inside)})

    def close(self) -> None:
        """Send what is left, as far as the trackers can be reached. A second call does nothing."""
        for delivery in self._deliveries:
            delivery.close()

    def _add(self, record: dict[str, Any]) -> None:
        for delivery in self._deliveries:
            delivery.add(record)


def open_trackers(run: Run, step: int) -> Trackers:
    """Open the trackers that the recipe names, for a run that continues after `step` steps.

    Raises MissingExtra if the package of one is not installed.
    """
    return open_for(_subject(run), step, list(dict.fromkeys(run.train.watch.trackers)))


def send_pending(run: Run) -> None:
    """Send a finished run's records that an outage kept from its trackers. Raises MissingExtra."""
    names = dict.fromkeys(run.train.watch.trackers)
    pending = [name for name in names if _pending(run.folder, name).exists()]
    open_for(_subject(run), run.train.steps, pending).close()


def require(names: Sequence[str], field: str) -> None:
    """Raise MissingExtra, naming the recipe's `field`, if the package of a tracker is not installed."""
    for name in names:
        importlib.import_module(f"capstan.training.monitoring.trackers.{name}").require(field)


def _subject(run: Run) -> Subject:
    return Subject(run.folder, run.train.identity, run.folder.name)


def open_for(subject: Subject, step: int, names: Sequence[str]) -> Trackers:
    """Open the trackers `names` for records about `subject`. Raises MissingExtra."""
    clients = {name: importlib.import_module(f"capstan.training.monitoring.trackers.{name}") for name in names}
    for client in clients.values():
        client.require()
    deliveries = [
        Delivery(
            name, functools.partial(client.Tracker, subject, step), _pending(subject.folder, name), step, client.rejects
        )
        for name, client in clients.items()
    ]
    return Trackers(subject.folder, deliveries)


def _pending(folder: Path, name: str) -> Path:
    return folder / f"{name}-pending.jsonl"
