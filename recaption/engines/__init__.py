"""Caption engines: what writes a caption for a picture, each in its own file, loaded when it is asked for.

JPEG bytes ──prepare, on CPU workers──▶ uint8 pixels ──caption, on model workers──▶ slot → Caption
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from recaption.config import RecaptionConfig
from recaption.lint import Finish


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption as the model wrote it."""

    raw: str
    tokens: int  # that the model wrote, the end token not counted
    finish: Finish  # "end": the model ended it; "length": it was cut
    seed: int  # that the choice of its tokens came from; 0 where nothing was left to chance


class CaptionEngine(Protocol):
    """Light to make and to send to workers: weights are loaded by the first `caption`.

    Captions depend on the picture and `identity` alone: never on the batch, on the worker or on what ran before.
    """

    def identity(self) -> dict[str, Any]:
        """Everything that can change a caption, as plain data: weights, preprocessing, prompts, decoding."""

    def prepare(self, data: bytes) -> np.ndarray:
        """An encoded picture as uint8 [height, width, 3]. Raises an Exception for a broken one."""

    def caption(self, pixels: np.ndarray, keys: Sequence[str]) -> list[Mapping[str, Caption]]:
        """Captions for uint8 [batch, height, width, 3], a mapping of slot → Caption for each picture.

        `keys` name the pictures' contents: the same key and identity draw the same random numbers.
        """


def make(config: RecaptionConfig) -> CaptionEngine:
    """The engine that a recipe asks for. Raises RecipeError where it cannot work."""
    from recaption.engines.coca import CocaEngine

    engines = {"coca": CocaEngine}
    return engines[config.engine](config)
