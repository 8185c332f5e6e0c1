"""Short prompts → prompts in the style of the training captions.

The upsampling of the DALL-E 3 paper (appendix C), which uses GPT-4. A recipe can name any engine that writes text.
Without one, `captions` returns the training caption that shares most with the prompt: it has the right style, and is as
accurate as the nearest caption.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.recaption.lint.rules import words
from capstan.recaption.upsample import Style, expand, text_engine
from capstan.training.data.order import hash64
from capstan.training.experiment.caption_accuracy import shown_captions
from capstan.training.experiment.config import ExperimentConfig

_SLOT = "descriptive"


class Nearest:
    """Lookup of the caption that shares the rarest words and word pairs with a prompt.

    Each shared word or pair of neighbouring words counts log(captions / captions that have it). Ties are broken by a
    hash of both texts.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        self.captions = sorted(set(captions))
        having: defaultdict[str, list[int]] = defaultdict(list)
        for number, caption in enumerate(self.captions):
            for feature in _features(caption):
                having[feature].append(number)
        self._having = {feature: np.array(numbers) for feature, numbers in having.items()}

    def __call__(self, prompt: str) -> str:
        shared = np.zeros(len(self.captions))
        for feature in _features(prompt):
            if feature in self._having:
                shared[self._having[feature]] += math.log(len(self.captions) / len(self._having[feature]))
        best = np.flatnonzero(shared >= shared.max() - 1e-9)
        return min((self.captions[number] for number in best), key=lambda text: hash64("nearest", prompt, text))


def _features(text: str) -> set[str]:
    tokens = words(text)
    return {*tokens, *map(" ".join, itertools.pairwise(tokens))}


def expanded(
    recipe: Recipe, config: ExperimentConfig, layer: str | None, prompts: Sequence[str], holdout: int = 0
) -> list[str] | None:
    """Return the expanded prompts, or None if the recipe has no upsampler. Raises RecipeError."""
    if config.upsampler is None:
        return None
    captions = _captions(recipe, layer, holdout)
    if config.writer is not None:
        return expand(text_engine(config.writer), prompts, Style.of(captions))
    nearest = Nearest(captions)
    return [nearest(prompt) for prompt in prompts]


def _captions(recipe: Recipe, layer: str | None, holdout: int) -> list[str]:
    """Return the layer's descriptive captions, without those of held-out samples."""
    shown = () if layer is None else shown_captions(recipe, layer, holdout)
    captions = [row[_SLOT] for row in shown if _SLOT in row]
    if not captions:
        hint = "use a layer with descriptive captions, or set upsampler: null"
        raise RecipeError("experiment.upsampler", "needs descriptive captions, and train.data.layer has none", hint)
    return captions
