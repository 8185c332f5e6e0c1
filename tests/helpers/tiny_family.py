"""A model family for the tests: guesses a square's colour from its caption, in milliseconds.

It has what makes resuming hard: dropout, noise from `draw`, randomness in `prepare`, and a buffer that changes.
"""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from capstan.pipeline.config import Section
from capstan.training.config import TrainConfig
from capstan.training.family import Batch, Family, Metrics, Sample, Samples, Step


class TinySettings(Section):
    width: int = 16
    explode_at: int | None = None  # a sample number's text from which the loss is not finite
    rise_at: float | None = None  # the step from which the loss is a thousand times what it was
    sleep_s: float = 0.0  # in every loss


class TinyModel(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(128, width)
        self.norm = torch.nn.LayerNorm(width)
        self.dropout = torch.nn.Dropout(0.1)
        self.head = torch.nn.Linear(width, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids [B, L] → colour [B, 3]."""
        self.seen += ids.shape[0]
        return self.head(self.dropout(self.norm(self.embed(ids).mean(1))))


class TinyFamily(Family):
    name: ClassVar[str] = "tiny"
    settings: ClassVar[type[Section]] = TinySettings

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        (folder / "captions.json").write_text(json.dumps(sorted(set(samples.captions()))))

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        assert (assets / "captions.json").exists()
        self.options: TinySettings = train.settings
        self.model, self.steps = TinyModel(self.options.width), 0

    def start_from(self, product: Path) -> None:
        self.model.load_state_dict(torch.load(product / "weights.pt"))

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        ids = torch.tensor([[ord(letter) % 128 for letter in sample.text.ljust(24)[:24]] for sample in samples])
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(sample.jpeg))) for sample in samples])
        jitter = np.array([sample.rng().normal(0, 0.01) for sample in samples], dtype=np.float32)
        colour = torch.from_numpy(pixels[:, 8, 8].astype(np.float32) / 255 + jitter[:, None])
        bad = [self.options.explode_at is not None and f"number {self.options.explode_at}" in s.text for s in samples]
        numbers = torch.tensor([json.loads(sample.extra)["index"] for sample in samples])
        return {"ids": ids, "colour": colour, "bad": torch.tensor(bad), "number": numbers}

    def begin_step(self, model: torch.nn.Module, parts: Sequence[Batch], step: Step) -> None:
        """Die by SIGKILL, once, where $TINY_KILL has a file named STEP-RANK."""
        if folder := os.environ.get("TINY_KILL"):
            order = Path(folder) / f"{step.number}-{os.environ.get('RANK', '0')}"
            if order.exists():
                order.unlink()
                os.kill(os.getpid(), signal.SIGKILL)

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        time.sleep(self.options.sleep_s)
        if folder := os.environ.get("TINY_RECORD"):  # what was seen, a line a step: by which of how many workers
            name = f"{os.environ.get('WORLD_SIZE', '1')}-{os.environ.get('RANK', '0')}"
            with (Path(folder) / name).open("a") as file:
                file.write(" ".join(str(int(number)) for number in batch["number"]) + "\n")
        noise = torch.randn(batch["colour"].shape, generator=draw, device=draw.device) * 0.01
        error = model(batch["ids"]).float() - batch["colour"] - noise
        error = error.masked_fill(batch["bad"][:, None], float("nan"))
        self.steps += 1
        if self.options.rise_at is not None and self.steps > self.options.rise_at:
            error = error + 100
        seen = (batch["number"] * 2654435761 % 2**32).double().mean()  # of which samples, on however many workers
        return error.square().mean(), {"worst": error.detach().abs().max(), "seen": seen}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "weights.pt")
        (folder / "capstan.json").write_text('{"family": "tiny"}')
