"""Caption engines, each in its own module and loaded on demand

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

CUT_BEFORE_TEXT: Final = "cut_before_text"  # reason: all of max_tokens went into reasoning
MAX_TOKENS: Final = 256  # default of recaption.max_tokens for chat engines

# uint8 RGB [height, width, 3], an encoded image, or encoded frames of a clip for engines of servers
EngineInput: TypeAlias = np.ndarray | bytes | tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """The captions requested for one image."""

    sha256: str  # of the image's source bytes; with slot and attempt it determines the random numbers
    slots: tuple[str, ...]
    original: str = ""  # the caption that came with the image; read only by engines that set `uses_original`


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption as the model wrote it, or the reason why there is none."""

    raw: str
    tokens: int  # generated tokens, without the end token
    finish: Finish  # "end": complete; "length": cut by the token limit; "none": no caption
    seed: int  # the seed of sampling; 0 if nothing was sampled
    # finish "none": why, e.g. `http_503`, `timeout`; retried by the next run. With a text: a flag, `content_filter`
    reason: str = ""
    message: str = ""  # finish "none": the message of a server or library
    parted: bool = False  # decoded by CLIP's tokenizer, with spaces around punctuation and between digits


@runtime_checkable
class CaptionEngine(Protocol):
    """The interface of an engine. Cheap to create and pickle: packages and weights are loaded by the first `caption`.

    A caption depends on the image, the request, the attempt and `describe`, never on the batch, the worker or earlier
    calls.
    """

    @property
    def uses_original(self) -> bool:
        """Return whether a prompt quotes the original caption, so that captions depend on it."""

    def describe(self) -> dict[str, Any]:
        """Return everything that can change a caption as plain data: weights, preprocessing, prompts, decoding.

        The layer id is a hash of it. `attempt` and settings of speed are not part of it.
        """

    def prepare(self, jpeg: bytes) -> EngineInput:
        """Return what `caption` needs of an image, in a compact form. Loads no model.

        Raises Exception for a broken image.
        """

    def caption(
        self, images: Sequence[EngineInput], requests: Sequence[Request], *, attempt: int = 0
    ) -> list[dict[str, Caption]]:
        """Return slot → Caption for each image, with exactly the slots of its request.

        `attempt` 0 decodes as the recipe says. Later attempts replace bad captions: they always sample, even if the
        recipe's method is greedy.
        """


@runtime_checkable
class TextEngine(Protocol):
    """An engine that also answers text prompts without an image."""

    def write(self, prompts: Sequence[str], *, seeds: Sequence[int], max_tokens: int) -> list[Caption]:
        """Return one answer per prompt, of at most `max_tokens` tokens."""


# Engine → module and class. Imported on demand, so that an engine needs only its own packages.
ENGINES: Final[Mapping[str, tuple[str, str]]] = {
    "coca": ("capstan.recaption.engines.coca", "CocaEngine"),
    "transformers": ("capstan.recaption.engines.transformers", "TransformersEngine"),
    "openai": ("capstan.recaption.engines.openai", "OpenAIEngine"),
    "vllm": ("capstan.recaption.engines.vllm", "VllmEngine"),
}


def make(config: RecaptionConfig, *, workers: int = 1) -> CaptionEngine:
    """Return the recipe's engine; `workers` instances will run at once and share rate limits.

    Raises RecipeError if the recipe does not fit the engine.
    """
    module, name = ENGINES[config.engine]
    engine: CaptionEngine = getattr(importlib.import_module(module), name)(config, workers=workers)
    return engine


def seed_of(seed: int, sha256: str, slot: str, attempt: int) -> int:
    """Return one caption's seed: 63 bits from the recipe's seed, the image, the slot and the attempt."""
    digest = hashlib.blake2b(f"{seed} {sha256} {slot} {attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def chat_settings(config: RecaptionConfig, prompts: Mapping[str, str], versions: Mapping[str, int]) -> dict[str, Any]:
    """Return the recipe settings that can change a caption of a chat engine, for `describe`."""
    return {
        "max_side": config.max_side,
        "system": config.system,
        "prompts": dict(prompts),
        "prompt_versions": dict(versions),
        "decoding": config.decoding.model_dump(),
        "max_tokens": config.max_tokens or MAX_TOKENS,
    }


def need(package: str, extra: str, field: str = "recaption.engine") -> Any:
    """Import an optional package. Raises MissingExtra, which names the extra to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != package.partition(".")[0]:
            raise  # the package exists but one of its dependencies does not: MissingExtra would mislead
        raise MissingExtra(field, package, extra) from None


def size_of(image: EngineInput) -> int:
    """Return the bytes that an engine input occupies in transit."""
    if isinstance(image, tuple):
        return sum(map(len, image))
    return len(image) if isinstance(image, bytes) else image.nbytes
