"""A model family that leaves in the log which samples each step saw, in which order and with which captions."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from capstan.pipeline.config import Section
from capstan.training.config import TrainConfig
from capstan.training.family import Batch, Family, Metrics, Sample, Samples


class RecordingSettings(Section):
    sleep_s: float = 0.0  # in every step, so that there is time to take a node away


class RecordingFamily(Family):
    name: ClassVar[str] = "recording"
    settings: ClassVar[type[Section]] = RecordingSettings

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        (folder / "captions.json").write_text(json.dumps(sorted(set(samples.captions()))))

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        self.options: RecordingSettings = train.settings
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        pixels = [np.asarray(Image.open(io.BytesIO(sample.jpeg)))[4, 4] / 255 for sample in samples]
        lengths = [[len(sample.text) / 100] for sample in samples]
        order = [_number(f"{place} {sample.key} {sample.text}") for place, sample in enumerate(samples)]
        tensors = {"colour": torch.tensor(np.stack(pixels), dtype=torch.float32), "length": torch.tensor(lengths)}
        return {**tensors, "order": torch.tensor(order, dtype=torch.float64)}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        time.sleep(self.options.sleep_s)
        return (model(batch["colour"]) - batch["length"]).square().mean(), {"order": batch["order"].sum()}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "weights.pt")
        (folder / "capstan.json").write_text('{"family": "recording"}')


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
