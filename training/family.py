"""A model family: samples → batch → loss → product. The loop knows no model; a family knows no cluster.

    Sample (bytes, caption) ──prepare──▶ batch of tensors ──loss──▶ scalar          and at the end   save ──▶ product/

A family is a folder: a class derived from `Family`, its settings (a pydantic `Section`) and its model, named in
`capstan.training.config.FAMILIES` or in a recipe as `package.module:Class`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from capstan.pipeline.config import Section
from capstan.training.config import TrainConfig
from capstan.training.distributed.adversary import Adversary


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and the caption that was drawn for it in this epoch."""

    key: str
    jpeg: bytes  # encoded image; empty where `latent` stands in for it
    text: str  # the caption drawn from the blend
    slot: str  # where it came from: "original" or a slot of the caption layer
    epoch: int
    seed: int  # of this sample in this epoch, non-negative, 63 bits: for crops, flips and other draws of `prepare`
    width: int  # of the stored image, pixels
    height: int
    original_width: int  # of the source, pixels
    original_height: int
    extra: str = "{}"  # JSON object of the source's other columns
    latent: np.ndarray | None = None  # what the encoder of `train.data.latents` made of the image
    crop_left: int = 0  # pixels of the scaled source that the stored image lacks there (negative: padded)
    crop_top: int = 0
    bucket: tuple[int, int] | None = None  # width and height, pixels, that all images of the batch are cut to
    states: Mapping[str, np.ndarray] | None = None  # what `Family.text_encoder` made of the text, by name

    def rng(self) -> np.random.Generator:
        """Randomness for `prepare` that is the same whenever this sample is seen in this epoch."""
        return np.random.default_rng(self.seed)


class Samples(Protocol):
    """The dataset as a family sees it while its assets are made (`capstan.training.data.dataset.TrainingData`)."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Sample `index` in dataset order."""

    def captions(self) -> Iterator[str]:
        """Every caption that the blend may show, sample by sample."""


class TextEncoder(Protocol):
    """Frozen text encoders of a family, as `capstan encode` runs them ahead of training."""

    def identity(self) -> dict[str, Any]:
        """All that can change a state, as plain data."""

    def to(self, device: torch.device) -> object: ...

    def __call__(self, texts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Texts → states by name, the first axis being the texts; of one shape whatever the texts."""


class PerSampleLoss(NamedTuple):
    """A value for each sample of a batch, to be logged by where in [0, 1] the sample lies (its time, say)."""

    values: torch.Tensor  # [B]
    places: torch.Tensor  # [B]


Batch = dict[str, torch.Tensor]  # every tensor's first dimension is the batch
Metrics = Mapping[str, float | torch.Tensor | PerSampleLoss]  # scalars or per-sample; tensors may stay on their device


class Family(ABC):
    """What a kind of model must say of itself to be trained.

    `name` is its section's name in the recipe (`train.<name>`), `settings` validates that section, and `captions` says
    whether texts are needed at all (if not, no caption layer is read).
    """

    name: ClassVar[str]
    settings: ClassVar[type[Section]]
    captions: ClassVar[bool] = True
    buckets: ClassVar[bool] = False  # whether batches of other sizes than squares are understood

    model: torch.nn.Module  # the one trainable module; set by __init__, fp32 on the CPU
    frozen: Sequence[torch.nn.Module] = ()  # what only computes: never optimised, never sharded, moved to the device
    rival: Adversary | None = None  # a second model that the first is trained against; built by __init__ after `model`

    @classmethod  # noqa: B027 - few families need it
    def check(cls, train: TrainConfig) -> None:
        """Raise RecipeError where the family's settings do not go with the run's; called as the recipe is read."""

    @classmethod  # noqa: B027 - few families need it
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write into `folder` what is made from the dataset once a run: a tokenizer, latent statistics.

        Called by one process before any worker builds the model; `folder` is published whole or not at all.
        """

    @abstractmethod
    def __init__(self, train: TrainConfig, assets: Path) -> None:
        """Build `self.model` and the frozen parts. `assets` is the folder that `make_assets` filled.

        Weights are drawn from torch's global generator, which has been seeded with `train.seed`: all workers build the
        same model. `train.settings` holds the family's own settings.
        """

    @classmethod
    def text_encoder(cls, train: TrainConfig) -> TextEncoder | None:
        """The text encoders whose states may be made ahead (`Sample.states`); None where they are trained."""
        return None

    @classmethod
    def multiples(cls, train: TrainConfig) -> tuple[int, int]:
        """Of how many latents the side of a square must be a multiple, and both sides of an aspect-ratio bucket."""
        return 1, 1

    def start_from(self, product: Path) -> None:
        """Load the weights of a product that `save` wrote into `self.model` (`train.init`)."""
        raise TypeError(f"train.init is not for the family {self.name}")

    @abstractmethod
    def prepare(self, samples: Sequence[Sample]) -> Batch:
        """Decode, crop, tokenize: samples → CPU tensors. Runs on loader threads, outside autograd.

        All randomness comes from `Sample.rng`, so that a resumed run sees the same batch.
        """

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        """The mean loss over the batch (scalar, with gradient) and scalars (or a `PerSampleLoss`) to log.

        `model` is `self.model` as the engine wraps it: call it, don't reach into it (weights may be sharded).
        `batch` is this worker's share of the step's batch (or of one part of it, with `accumulate`), on the device.
        All randomness comes from `draw`, which lives on the device and is seeded by (seed, step, part, worker).
        """

    @abstractmethod
    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the product in its library's own format into `folder`, which is published whole or not at all.

        `model` is a plain copy of `self.model` with the EMA's weights: fp32, on the CPU, in evaluation mode.
        """

    def to(self, device: torch.device) -> None:
        """Move the frozen parts to `device`, in evaluation mode."""
        for module in self.frozen:
            module.to(device).eval().requires_grad_(False)

    def describe(self) -> dict[str, Any]:
        """Facts worth a line in the log (sizes of the model's parts)."""
        return {"parameters": sum(p.numel() for p in self.model.parameters())}
