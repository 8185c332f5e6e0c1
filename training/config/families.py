"""Model families by name: their settings, which need no torch, and their classes, which do"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError

if TYPE_CHECKING:
    from capstan.training.config import TrainConfig

Crop = Literal["center", "random"]


class Named(NamedTuple):
    """A family of Capstan's own: `module:Class` of its settings, and of the family."""

    settings: str
    family: str


def _named(folder: str, name: str) -> Named:
    module = f"capstan.training.models.{folder}"
    return Named(f"{module}.config:{name}Settings", f"{module}.family:{name}Family")


# A family is a folder. To add one, add it here: nothing else in training names families.
FAMILIES: Final = {
    "attngan": _named("attngan", "Attngan"),
    "audio": _named("audio", "Audio"),
    "audiovideo": _named("audiovideo", "Audiovideo"),
    "autoencoder": _named("autoencoder", "Autoencoder"),
    "captioner": _named("captioner", "Captioner"),
    "cogvideox": _named("cogvideox", "Cogvideox"),
    "dalle": _named("dalle", "Dalle"),
    "damsm": _named("damsm", "Damsm"),
    "ddpm": _named("ddpm", "Ddpm"),
    "diffusion": _named("diffusion", "Diffusion"),
    "dvae": _named("dvae", "Dvae"),
    "imagen": _named("imagen", "Imagen"),
    "oobleck": _named("oobleck", "Oobleck"),
    "svd": _named("svd", "Svd"),
    "text2scene": _named("text2scene", "Text2scene"),
    "video": _named("video", "Video"),
    "video_autoencoder": _named("video_autoencoder", "VideoAutoencoder"),
    "vitvqgan": _named("vitvqgan", "Vitvqgan"),
    "vqgan": _named("vqgan", "Vqgan"),
}


class FamilySettings(Section):
    """The section `train.<family>`, and what must be known of the family to check a recipe without loading torch."""

    captions: ClassVar[bool] = True  # whether the family needs texts; if not, no caption layer is read
    buckets: ClassVar[bool] = False  # whether batches may have other shapes than squares
    draws: ClassVar[str | None] = None  # what it draws from prompts (drawing.drawer.Kind); None: it is no generator
    reads: ClassVar[tuple[str, ...]] = ("jpg",)  # files of a sample that it is trained on: jpg, mp4, flac

    def reads_captions(self) -> bool:
        """Return whether a run with these settings needs texts, and a model that draws takes prompts."""
        return self.captions

    def check(self, train: TrainConfig) -> None:
        """Raise RecipeError if these settings conflict with the run's; called when the recipe is read."""

    def models(self) -> dict[str, str]:
        """Return key of this section → path or URL, for every finished model that training starts from."""
        return {}


@dataclass(frozen=True)
class Traits:
    """What a recipe's check needs of the family that `train.model` names."""

    name: str  # of its section
    settings: type[Section]
    captions: bool
    buckets: bool
    draws: str | None
    reads: tuple[str, ...]
    own: Any = None  # the class of a user's own family

    def check(self, train: TrainConfig) -> None:
        """Raise RecipeError if the family's settings conflict with the run's."""
        if self.own is not None:
            self.own.check(train)
        else:
            train.settings.check(train)


def reads_captions(train: TrainConfig) -> bool:
    """Return whether a run needs texts, and a model that draws takes prompts."""
    if isinstance(train.settings, FamilySettings):
        return train.settings.reads_captions()
    return traits_of(train.model).captions


def traits_of(name: str) -> Traits:
    """Return the traits of the family that `train.model` names; loads torch only for a user's own family.

    Raises RecipeError if there is no such family.
    """
    if name in FAMILIES:
        settings = _imported(FAMILIES[name].settings)
        return Traits(name, settings, settings.captions, settings.buckets, settings.draws, settings.reads)
    own = family_class(name)
    return Traits(own.name, own.settings, own.captions, own.buckets, own.draws, own.reads, own)


def family_class(name: str, field: str = "train.model") -> Any:
    """Return the `Family` class of this name, as in `train.model`. Raises RecipeError naming `field` if none."""
    if name in FAMILIES:
        return _imported(FAMILIES[name].family)
    if ":" not in name:
        hint = f"use one of {', '.join(sorted(FAMILIES))}, or package.module:Class"
        raise RecipeError(field, f"no model family {name!r}", hint)
    try:
        return _imported(name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise RecipeError(field, f"cannot load {name} ({error})", "name an importable class") from None


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
