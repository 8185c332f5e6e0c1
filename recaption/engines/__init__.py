"""Caption engines: what writes a caption for an image, each in its own file, loaded when it is asked for.

JPEG bytes ──prepare, on CPU workers──▶ EngineInput ──caption, on model workers──▶ slot → Caption
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import numpy as np

from capstan.pipeline.errors import MissingExtra
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.lint.linter import Finish

MAX_TOKENS: Final = 256  # new tokens a caption of an engine that is asked in words, where the recipe names no number

EngineInput: TypeAlias = np.ndarray | bytes  # uint8 RGB [height, width, 3], or an encoded image: what `prepare` made


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for one image."""

    sha256: str  # of the image's source bytes: with slot and attempt it names the random numbers that are drawn
    slots: tuple[str, ...]
    original: str = ""  # the caption that came with the image; only engines that say `uses_original` look at it


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption as the model wrote it."""

    raw: str
    tokens: int  # that the model wrote, the end token not counted
    finish: Finish  # "end": the model ended it; "length": it was cut; "none": there is no caption
    seed: int  # that the choice of its tokens came from; 0 where nothing was left to chance
    reason: str = ""  # finish "none": why, e.g. `http_503`, `timeout`, `content_filter`; worth another run
    parted: bool = False  # CLIP's tokenizer wrote it, with spaces around marks and between digits


@runtime_checkable
class CaptionEngine(Protocol):
    """Light to make and to send to workers: packages and weights are loaded by the first `caption`.

    A caption depends on the image, the request, the attempt and what `describe` says: never on the batch, on the
    worker or on what ran before.
    """

    @property
    def uses_original(self) -> bool:
        """Whether a prompt quotes the original caption, so that captions depend on it too."""

    def describe(self) -> dict[str, Any]:
        """Everything that can change a caption, as plain data: weights, preprocessing, prompts, decoding.

        The recipe id is made of it; `attempt` is no part of it, nor is how fast captions are made.
        """

    def prepare(self, jpeg: bytes) -> EngineInput:
        """What `caption` needs of an image, small enough to travel. Loads no model.

        Raises an Exception for a broken image.
        """

    def caption(
        self, images: Sequence[EngineInput], requests: Sequence[Request], *, attempt: int = 0
    ) -> list[dict[str, Caption]]:
        """One mapping of slot → Caption for each image, with exactly the slots that its request names.

        `attempt` 0 decodes as the recipe says. A later one draws other tokens, also where the recipe's method is
        greedy: it is for captions in which something was found wrong.
        """


@runtime_checkable
class TextEngine(Protocol):
    """An engine that also answers questions without an image."""

    def write(self, prompts: Sequence[str], *, seeds: Sequence[int], max_tokens: int) -> list[Caption]:
        """One answer a prompt, of at most `max_tokens` tokens."""


# Engine → module and class. Modules are imported when they are asked for: one engine's packages are no other's.
ENGINES: Final[Mapping[str, tuple[str, str]]] = {
    "coca": ("capstan.recaption.engines.coca", "CocaEngine"),
    "transformers": ("capstan.recaption.engines.transformers", "TransformersEngine"),
    "openai": ("capstan.recaption.engines.openai", "OpenAIEngine"),
}


def make(config: RecaptionConfig, *, workers: int = 1) -> CaptionEngine:
    """The engine that a recipe asks for; `workers` of them will run at once and share what is limited.

    Raises RecipeError where it cannot work.
    """
    module, name = ENGINES[config.engine]
    engine: CaptionEngine = getattr(importlib.import_module(module), name)(config, workers=workers)
    return engine


def seed_of(seed: int, sha256: str, slot: str, attempt: int) -> int:
    """Of one caption's random numbers: 63 bits from the recipe's seed, the image, the slot and the attempt."""
    digest = hashlib.blake2b(f"{seed} {sha256} {slot} {attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def chat_settings(config: RecaptionConfig, prompts: Mapping[str, str], versions: Mapping[str, int]) -> dict[str, Any]:
    """What of the recipe can change a caption of an engine that is asked in words: part of what it describes."""
    return {
        "max_side": config.max_side,
        "system": config.system,
        "prompts": dict(prompts),
        "prompt_versions": dict(versions),
        "decoding": config.decoding.model_dump(),
        "max_tokens": config.max_tokens or MAX_TOKENS,
    }


def need(package: str, extra: str, field: str = "recaption.engine") -> Any:
    """Import a package that not every installation has. Raises MissingExtra, which names the extra to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != package.partition(".")[0]:
            raise  # the package is there, something of its own is not: a MissingExtra would mislead
        raise MissingExtra(field, package, extra) from None


def size_of(image: EngineInput) -> int:
    """Bytes that an image takes on its way to a model worker."""
    return len(image) if isinstance(image, bytes) else image.nbytes
