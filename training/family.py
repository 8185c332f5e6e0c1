"""Interface of a model family: samples → batch → loss → product

The training loop knows nothing about models; a family knows nothing about workers.

    Sample (bytes, caption) ──prepare──▶ batch of tensors ──loss──▶ scalar          and at the end   save ──▶ product/
    product/ ──open──▶ Drawer ──draw──▶ images, for samples and metrics             and to leave   export ──▶ a folder

A family is a folder: a class derived from `Family`, its settings (a pydantic `Section`) and its model, named in
`capstan.training.config.FAMILIES` or in a recipe as `package.module:Class`.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from capstan.pipeline.config import Section
from capstan.training.config import TrainConfig
from capstan.training.config.families import FamilySettings
from capstan.training.distributed.adversary import Adversary
from capstan.training.distributed.step import Step
from capstan.training.drawing.drawer import ClipCodec, Codec, Drawer, Kind, Matcher, Size, SoundCodec, refuse_options


@dataclass(frozen=True, slots=True)
class Sample:
    """An image and the caption drawn for it in this epoch."""

    key: str
    jpeg: bytes  # encoded image; empty if `latent` replaces it, or the family reads none
    text: str  # the caption drawn from the blend
    slot: str  # of the caption: "original" or a slot of the caption layer
    epoch: int
    seed: int  # of this sample in this epoch, 63 bits: for crops, flips and other random choices of `prepare`
    width: int  # of the stored image, pixels
    height: int
    original_width: int  # of the source, pixels
    original_height: int
    extra: str = "{}"  # JSON object of the source's other columns
    latent: np.ndarray | None = None  # of the image, by `Family.encoder` (`train.data.latents`)
    crop_left: int = 0  # pixels of the scaled source cut off on this side (negative: padded)
    crop_top: int = 0
    bucket: tuple[int, int] | None = None  # width and height in pixels of all images of the batch
    states: Mapping[str, np.ndarray] | None = None  # of the text, by name, from `Family.text_encoder`
    parts: Mapping[str, bytes] = field(default_factory=dict)  # other files by suffix, as `Family.reads` says

    def rng(self) -> np.random.Generator:
        """Return the random generator for `prepare`, the same whenever this sample is read in this epoch."""
        return np.random.default_rng(self.seed)


class Samples(Protocol):
    """The dataset as `Family.make_assets` sees it (`capstan.training.data.dataset.TrainingData`)."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Return sample `index` in dataset order."""

    def captions(self) -> Iterator[str]:
        """Yield every caption that the blend may use, sample by sample."""


class TextEncoder(Protocol):
    """Frozen text encoders of a family, as `capstan encode` runs them before training."""

    def identity(self) -> dict[str, Any]:
        """Return everything that can change a state, as plain data."""

    def to(self, device: torch.device) -> object: ...

    def __call__(self, texts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Return the states of `texts` by name, [len(texts), ...]; the shape does not depend on the texts."""


class Encoder(Protocol):
    """A frozen first stage of a family, as `capstan encode` runs it before training.

    `factor` is the number of pixels per latent along one side; None: it reads none (a sound's). `part` says what
    encodes, and which recipe key names it.
    """

    @property
    def factor(self) -> int | None: ...

    part: str

    def identity(self) -> dict[str, Any]:
        """Return everything but the size that can change a latent, as plain data."""

    def to(self, device: torch.device) -> object: ...

    def __call__(self, files: Sequence[bytes], size: Size) -> torch.Tensor:
        """Return the latents of samples' files, to be cut to `size`: [N, ...], of an image [N, ..., h, w].

        A file is a JPEG, or of the suffix that `Family.reads` names beside jpg where a sample has one.

        Floats are stored as float16, integers (tokens) as int16.
        """


class PerSampleLoss(NamedTuple):
    """A loss for each sample of a batch, logged by the sample's place in [0, 1] (its timestep, for example)."""

    values: torch.Tensor  # [B]
    places: torch.Tensor  # [B]


Batch = dict[str, torch.Tensor]  # every tensor's first dimension is the batch
Metrics = Mapping[str, float | torch.Tensor | PerSampleLoss]  # scalars or per-sample; tensors may stay on their device


def finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return whether all values of all tensors are finite, as a 0-d tensor on their device (no synchronisation)."""
    flags = [tensor.detach().isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return torch.stack(flags).all() if flags else torch.tensor(True)


def gradient_only(term: torch.Tensor) -> torch.Tensor:
    """Return a term that adds its gradient to a loss and nothing to its value.

    The value of an adversarial term shows which side is ahead, not how good the model is, and would make the loss look
    divergent (`train.diverged`).
    """
    return term - term.detach()


class Family(ABC):
    """Interface that every trainable kind of model implements.

    `name` is the recipe section (`train.<name>`) and `settings` validates it. `captions` says whether the family needs
    texts; if not, no caption layer is read.
    """

    name: ClassVar[str]
    settings: ClassVar[type[Section]]
    captions: ClassVar[bool] = True
    buckets: ClassVar[bool] = False  # whether batches may have other shapes than squares
    draws: ClassVar[Kind | None] = None  # what `open` draws: image, clip, sound, scene; None: it is not a generator
    reads: ClassVar[tuple[str, ...]] = ("jpg",)  # files of a sample that it is trained on: jpg, mp4, flac

    model: torch.nn.Module  # the one trainable module; set by __init__, fp32 on the CPU
    frozen: Sequence[torch.nn.Module] = ()  # modules that are not trained: never sharded, moved to the device
    adversary: Adversary | None = None  # a second model to train against; built by __init__ after `model`
    bounds: Mapping[str, tuple[float, float]] = {}  # weight of `model` → least and largest value, kept after each step
    finite: Mapping[str, torch.Tensor] = {}  # part → was its output in the last `loss` finite? In order, set by `loss`

    @classmethod
    def check(cls, train: TrainConfig) -> None:
        """Raise RecipeError if the family's settings conflict with the run's; called when the recipe is read."""
        if isinstance(train.settings, FamilySettings):
            train.settings.check(train)

    @classmethod  # noqa: B027 - few families need it
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write into `folder` what is computed from the dataset once per run: a tokenizer, latent statistics.

        Called by one process before any worker builds the model. `folder` is published whole or not at all.
        """

    @abstractmethod
    def __init__(self, train: TrainConfig, assets: Path) -> None:
        """Build `self.model` and the frozen modules. `assets` is the folder that `make_assets` filled.

        Initial weights come from torch's global generator, seeded with `train.seed`, so that all workers build the same
        model. `train.settings` holds the family's own settings.
        """

    @classmethod
    def text_encoder(cls, train: TrainConfig) -> TextEncoder | None:
        """Return the text encoders whose states may be precomputed (`Sample.states`); None if they are trained."""
        return None

    @classmethod
    def encoder(cls, train: TrainConfig) -> Encoder | None:
        """Return the first stage whose latents may be precomputed (`Sample.latent`); None: it reads images alone."""
        return None

    @classmethod
    def multiples(cls, train: TrainConfig) -> tuple[int, int]:
        """Return the number of latents that must divide the side of a square, and both sides of a bucket."""
        return 1, 1

    @classmethod
    def untrained(cls, train: TrainConfig) -> torch.nn.Module | None:
        """Return the model that training starts from, on torch's default device: `capstan doctor` counts it on "meta".

        None if only the dataset or files of weights tell its shape.
        """
        return None

    def start_from(self, product: Path) -> None:
        """Load the weights of a product that `save` wrote into `self.model` (`train.init`)."""
        raise TypeError(f"the family {self.name} does not support train.init")

    @abstractmethod
    def prepare(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of `samples` as CPU tensors: decode, crop, tokenize. Runs on loader threads.

        Take all randomness from `Sample.rng`, so that a resumed run sees the same batch.
        """

    def begin_step(self, model: torch.nn.Module, parts: Sequence[Batch], step: Step) -> None:  # noqa: B027 - few need it
        """Add to each of this worker's `parts` what its loss needs of the others; called on every worker at each step.

        Gradients of the parts' losses are averaged over parts and workers. A loss that is a mean over samples needs
        nothing here; any other one (a mean over tokens, a comparison of samples) does, so that what is learnt does not
        depend on `accumulate` or the number of workers. `step` sums and gathers over workers, and its number is there
        for weights and temperatures that change during a run. Runs in the precision of `loss`.
        """

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        """Return the mean loss over the batch (scalar, with gradient) and scalars (or a `PerSampleLoss`) to log.

        `model` is `self.model` as wrapped by the engine: call it, but do not access its weights, which may be sharded.
        `batch` is this worker's share of the step's batch (with `accumulate`, of one part of it), on the device. Take
        all randomness from `draw`, which is on the device, by the functions of `training.draws`: each sample then has
        the same numbers in any part and on any worker.
        """

    @abstractmethod
    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the product into `folder` in its library's own format; `folder` is published whole or not at all.

        `model` is a plain copy of `self.model` with the EMA weights: fp32, on the CPU, in evaluation mode.
        """

    @classmethod
    def open(cls, product: Path, device: torch.device) -> Drawer:
        """Open a product that `save` or `export` wrote, to draw with it; only families with `draws`."""
        raise TypeError(f"the family {cls.name} does not draw")

    @classmethod
    def codec(cls, product: Path, device: torch.device) -> Codec | SoundCodec | ClipCodec | None:
        """Open a product to encode and decode images, sounds or clips; None if the family is not a first stage."""
        return None

    @classmethod
    def matcher(cls, product: Path, device: torch.device) -> Matcher | None:
        """Open a product to compare images with texts; None if the family does not."""
        return None

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        """Write into `folder`, which does not exist, what others open without Capstan; return its kind, for people.

        By default a copy of the product. Raises RecipeError for a precision or a sampler that it cannot have.
        """
        refuse_options({"sampler": sampler, "precision": None if precision == "fp32" else precision})
        shutil.copytree(product, folder)
        return cls.name

    def to(self, device: torch.device) -> None:
        """Move the frozen modules to `device`, in evaluation mode."""
        for module in self.frozen:
            module.to(device).eval().requires_grad_(False)

    def inspect(self, samples: Samples) -> None:  # noqa: B027 - only families with texts need it
        """Log what about the samples harms training; called on rank 0 at every start of a run."""

    def describe(self) -> dict[str, Any]:
        """Return facts for the log, such as parameter counts."""
        return {"parameters": sum(p.numel() for p in self.model.parameters())}
