"""TensorBoard: event files in RUN/tensorboard (`tensorboard --logdir RUN`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from capstan.training.run import Run


class Tracker:
    """TensorBoard event files."""

    def __init__(self, run: Run, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, file: Path) -> None:
        from PIL import Image

        with Image.open(file) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
