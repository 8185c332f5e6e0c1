"""Models that sleep, for benchmarks/soak.py: a scorer, a caption engine and a first stage.

What they return depends on the image alone. Workers import this module.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image

from capstan.pipeline.config import Section
from capstan.pipeline.score.scorer import Embedded, EmbeddingScorer
from capstan.recaption.engines import Caption, EngineInput, Request
from capstan.training.config import TrainConfig
from capstan.training.family import Batch, Encoder, Family, Metrics, Sample

SLEEP = "CAPSTAN_SOAK_SLEEP_S"  # the environment variable with the seconds of each batch


def sleep() -> None:
    time.sleep(float(os.environ.get(SLEEP, "0")))


class SleepingClip:
    """In place of a CLIP: its embedding of an image is the mean colour."""

    id = "0" * 16
    identity: ClassVar = {"model": "sleeping"}

    def prepare(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return np.asarray(Image.fromarray(rgb).resize((8, 8)))

    def load(self, device: str, threads: int) -> SleepingClip:
        return self

    def images(self, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
        sleep()
        return torch.from_numpy(pixels.astype(np.float32).mean(axis=(1, 2)))


class SleepingScorer(EmbeddingScorer):
    """The column `brightness`."""

    name, columns = "sleeping", [pa.field("brightness", pa.float32())]
    clip_model = SleepingClip()

    def score(self, batch: Embedded) -> dict[str, npt.NDArray[np.float32]]:
        return {"brightness": batch.raw_images.mean(dim=1).numpy()}


class SleepingEngine:
    """A caption engine (recaption.engines.CaptionEngine)."""

    uses_original = False

    def describe(self) -> dict[str, Any]:
        return {"engine": "sleeping"}

    def prepare(self, jpeg: bytes) -> EngineInput:
        return jpeg

    def caption(
        self, images: Sequence[EngineInput], requests: Sequence[Request], *, attempt: int = 0
    ) -> list[dict[str, Caption]]:
        sleep()
        return [
            {slot: Caption(f"An image known as {request.sha256[:12]}.", 6, "end", attempt) for slot in request.slots}
            for request in requests
        ]


class SleepingSettings(Section):
    """The section `train.sleeping`."""


class SleepingStage:
    """A first stage: one latent of four pixels by four, their mean colour."""

    factor, part = 4, "soak_models.SleepingStage"

    def identity(self) -> dict[str, Any]:
        return {"encoder": "sleeping"}

    def to(self, device: torch.device) -> object:
        return self

    def __call__(self, files: Sequence[bytes], size: tuple[int, int]) -> torch.Tensor:
        sleep()
        small = (size[0] // self.factor, size[1] // self.factor)
        images = [Image.open(io.BytesIO(file)).convert("RGB").resize(small) for file in files]
        return torch.tensor(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255


_UNTRAINED: Final = "the soak encodes its latents and never trains it"


class SleepingFamily(Family):
    """A family that has a first stage, and is not trained."""

    name: ClassVar[str] = "sleeping"
    settings: ClassVar[type[Section]] = SleepingSettings
    captions: ClassVar[bool] = False

    def __init__(self, train: TrainConfig, assets: Any) -> None:
        raise AssertionError(_UNTRAINED)

    @classmethod
    def encoder(cls, train: TrainConfig) -> Encoder:
        return SleepingStage()

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        raise AssertionError(_UNTRAINED)

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        raise AssertionError(_UNTRAINED)

    def save(self, model: torch.nn.Module, folder: Any) -> None:
        raise AssertionError(_UNTRAINED)
