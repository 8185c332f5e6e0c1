"""TensorBoard: event files in RUN/tensorboard (`tensorboard --logdir RUN`)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from capstan.training.monitoring.trackers.subject import Subject


def require(field: str = "") -> None:
    """Do nothing: TensorBoard comes with the extra `train`."""


def rejects(error: Exception) -> bool:
    """Return whether `error` means that this record cannot be written: a damaged PNG."""
    return isinstance(error, UnidentifiedImageError)


@functools.cache
def _print_no_error_twice() -> None:
    """Keep TensorBoard's writing thread from printing a traceback: the next call raises its error, which is logged."""
    before = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not type(raised.thread).__module__.startswith("tensorboard."):
            before(raised)

    threading.excepthook = hook


class Tracker:
    """TensorBoard event files."""

    def __init__(self, subject: Subject, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _print_no_error_twice()
        self.writer = SummaryWriter(str(subject.folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float], time_s: float) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step, walltime=time_s)

    def notes(self, step: int, values: Mapping[str, str], time_s: float) -> None:
        for name, value in values.items():
            self.writer.add_text(name, value, step, walltime=time_s)

    def image(self, step: int, name: str, file: Path, time_s: float) -> None:
        with Image.open(file) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, walltime=time_s, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
