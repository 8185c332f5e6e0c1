"""Interfaces of opened models: a drawer makes things from prompts, a codec takes images apart and together again, a
matcher compares images with texts

    Family.open(product, device) → Drawer       Drawer.draw(prompts, seeds, …) → Drawn(kind, arrays, fps, rate)
    Family.codec(product, device) → Codec       images → latents → images; SoundCodec, ClipCodec: of sounds, of clips
    Family.matcher(product, device) → Matcher   images, texts → how well they fit

Sampling, watching, evaluation and experiments know no family: they ask the family that trained a product to open it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypedDict, Unpack

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError

Kind = Literal["image", "clip", "sound", "film", "scene"]
Size = tuple[int, int]  # width and height, pixels


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a model drew, one item per seed.

    image   uint8 [N, H, W, 3]
    clip    uint8 [N, frames, H, W, 3], `fps` frames per second
    sound   float32 [N, values, channels] in −1 … 1, `rate` values per second
    film    a clip with its sound: `arrays` as of clips, `sounds` as of sounds
    scene   {background, objects} [N], as the columns of a dataset; `drawings` and `svgs` are what it looks like
    """

    kind: Kind
    arrays: np.ndarray
    fps: float | None = None
    rate: int | None = None
    sounds: np.ndarray | None = None  # of films: float32 [N, values, channels]
    drawings: np.ndarray | None = None  # of scenes: uint8 [N, H, W, 3]
    svgs: Sequence[str] | None = None  # of scenes

    @property
    def images(self) -> np.ndarray:
        """Return what metrics of images judge: uint8 [N, H, W, 3]."""
        return self.arrays if self.drawings is None else self.drawings

    def first(self, count: int) -> Drawn:
        """Return the first `count` items."""
        return self._part(slice(count))

    def only(self, number: int) -> Drawn:
        """Return one item."""
        return self._part(slice(number, number + 1))

    def _part(self, places: slice) -> Drawn:
        cut: dict[str, Any] = {"arrays": self.arrays[places]}
        for name in ("sounds", "drawings", "svgs"):
            if (values := getattr(self, name)) is not None:
                cut[name] = values[places]
        return replace(self, **cut)

    def __len__(self) -> int:
        return len(self.arrays)


def joined(shares: Sequence[Drawn | None], count: int) -> Drawn:
    """Return `count` drawings where worker r of n drew numbers r, r + n, …; None if it had none."""
    places = [(number % len(shares), number // len(shares)) for number in range(count)]

    def picked(name: str) -> Any:
        parts: list[Any] = [getattr(share, name, None) for share in shares]
        return None if parts[0] is None else [parts[worker][place] for worker, place in places]

    first = shares[0]
    assert first is not None, "the first worker draws"
    if first.kind == "scene":
        arrays = np.empty(count, dtype=object)
        arrays[:] = picked("arrays")
    else:
        arrays = np.stack(picked("arrays"))
    drawings, sounds = (None if (one := picked(name)) is None else np.stack(one) for name in ("drawings", "sounds"))
    return replace(first, arrays=arrays, drawings=drawings, sounds=sounds, svgs=picked("svgs"))


class Options(TypedDict, total=False):
    """What a user may choose of a drawing. None, or nothing, means the model's own default."""

    negative: str | None  # what not to draw
    steps: int | None
    guidance: float | None
    size: Size | None
    first_frames: np.ndarray | None  # images that a model continues: uint8 [N, side, side, 3]


class Continued(NamedTuple):
    """The clips that a model makes of images: number of frames, frames per second, side in pixels."""

    frames: int
    fps: float
    side: int


class Drawer(ABC):
    """An opened model that draws."""

    kind: ClassVar[Kind] = "image"
    prompted: bool = True  # whether what it draws depends on the prompts
    continues: Continued | None = None  # what it makes of the option `first_frames`; None: it starts from noise alone
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 16, **options: Unpack[Options]
    ) -> Drawn:
        """Draw one item per prompt and seed, which does not depend on the others of its batch.

        An option that the model does not have is refused by `refuse_options`.
        """

    def settings(self, *, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        """Return the sampling settings that these options amount to, for records of what was measured."""
        return {}

    def use_sampler(self, sampler: str) -> None:
        """Draw by another sampler. Raises RecipeError if the model has no such sampler."""
        raise RecipeError("--sampler", f"this model cannot be sampled by {sampler}", "remove it")

    def use_level(self, level: float) -> None:
        """Add noise of this level, 0 to 1, to the images that are enlarged or continued. Raises RecipeError if none."""
        raise RecipeError("--level", "this model enlarges no image of another", "remove it")

    def use_motion(self, bucket: int) -> None:
        """Draw clips with this much motion, 0 to 255. Raises RecipeError if the model has no such condition."""
        raise RecipeError("--motion", "this model has no such setting", "remove it")

    def ablated(self, prompts: Sequence[str], seeds: Sequence[int], batch: int) -> Mapping[str, np.ndarray]:
        """Return the images that are drawn without a part of the model, by the part's name: what is it worth?"""
        return {}

    def explained(self, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        """Return a PIL image of how prompts became images; None if the model has nothing to show."""
        return None

    def ceiling(self, images: np.ndarray, batch: int) -> np.ndarray:
        """Return true images, uint8 [N, H, W, 3] (or sounds), as the best model of this kind would draw them.

        A model that draws latents can draw no better than its autoencoder decodes.
        """
        return images

    def measures(
        self, images: np.ndarray, prompts: Sequence[str], batch: int, **options: Unpack[Options]
    ) -> Mapping[str, Mapping[str, float]]:
        """Return what else is worth measuring, given true images: name → {value, chance}."""
        return {}


class Codec(Protocol):
    """An opened first stage."""

    size: int  # pixels, both sides of the images that it was trained on

    def reconstruct(self, images: np.ndarray, batch: int) -> np.ndarray:
        """Encode and decode uint8 images [N, H, W, 3]; return uint8 [N, H, W, 3]."""

    def measures(self, images: np.ndarray, batch: int) -> Mapping[str, Mapping[str, float]]:
        """Return what else than its images is worth measuring: name → {value, chance}."""


class SoundCodec(ABC):
    """An opened first stage of sounds: `values` of each of `channels`, `rate` per second."""

    rate: int
    channels: int
    values: int

    @abstractmethod
    def reconstruct(self, sounds: np.ndarray, batch: int) -> np.ndarray:
        """Encode and decode sounds, float32 [N, values, channels] in −1 … 1; return them in the same form."""


class ClipCodec(ABC):
    """An opened first stage of clips: of `frames` frames, `fps` per second, of `size` pixels per side."""

    frames: int
    fps: float
    size: int

    @abstractmethod
    def reconstruct(self, clips: np.ndarray, batch: int) -> np.ndarray:
        """Encode and decode clips, uint8 [N, frames, H, W, 3]; return them in the same form."""


class Matcher(Protocol):
    """An opened model that says how well images and texts fit."""

    size: int  # pixels, both sides of the images that it was trained on

    def similarity(self, images: np.ndarray, texts: Sequence[str], batch: int) -> np.ndarray:
        """Return how well each of uint8 images [N, H, W, 3] fits each text: [N, texts], larger is better."""


def refuse_options(options: Mapping[str, Any]) -> None:
    """Raise RecipeError for the first option that is set: the model has no such setting."""
    for name, value in options.items():
        if value is not None:
            raise RecipeError(f"--{name}", "this model has no such setting", "remove it")
