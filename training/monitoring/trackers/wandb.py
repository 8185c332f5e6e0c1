"""Weights & Biases, configured by its environment variables (WANDB_PROJECT, …).

Its files are in RUN/wandb. A resumed run stays one W&B run, identified by the run folder's path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from capstan.pipeline.config import fingerprint
from capstan.pipeline.errors import MissingExtra
from capstan.training.monitoring.trackers.subject import FIELD, Subject

_PATIENCE_S: Final = 30  # of its client, which itself keeps what it has taken in RUN/wandb, for `wandb sync`


def require(field: str = FIELD) -> None:
    """Raise MissingExtra if W&B's client is not installed."""
    try:
        import wandb  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtra(field, "wandb", "wandb") from None


def rejects(error: Exception) -> bool:
    """Return whether `error` means that the client does not take this record."""
    return isinstance(error, TypeError | ValueError)


class Tracker:
    """A W&B run."""

    def __init__(self, subject: Subject, step: int) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "capstan"),
            name=subject.name,
            id=fingerprint({"folder": str(subject.folder.absolute())}),
            resume="allow",
            dir=str(subject.folder),
            config=dict(subject.config()),
            settings=wandb.Settings(console="off", silent=True, init_timeout=_PATIENCE_S, finish_timeout=_PATIENCE_S),
        )
        # W&B's own counter never goes back, and a killed run does: so the step is logged as a value like the others.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float], time_s: float) -> None:
        self.run.log({**values, "step": step})

    def notes(self, step: int, values: Mapping[str, str], time_s: float) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def image(self, step: int, name: str, file: Path, time_s: float) -> None:
        self.run.log({name: self.wandb.Image(str(file)), "step": step})

    def close(self) -> None:
        self.run.finish()
