"""Captions that are longer than a model reads, counted at the start of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from capstan.training.family import Samples

logger = logging.getLogger(__name__)

_SAMPLES: Final = 1024  # captions that are counted


def some_captions(samples: Samples) -> list[tuple[str, str]]:
    """Return (slot, caption) of evenly spaced samples, as the first epoch shows them."""
    step = max(1, len(samples) // _SAMPLES)
    chosen = [samples.sample(index) for index in range(0, len(samples), step)][:_SAMPLES]
    return [(sample.slot, sample.text) for sample in chosen]


def warn_of_cut(model: str, lengths: Sequence[int], limit: int, hint: str) -> None:
    """Log a warning if captions, given their tokens, are longer than `limit`: share, mean cut, and what to do."""
    cut = [tokens - limit for tokens in lengths if tokens > limit]
    if cut:
        logger.warning(
            "train %s: %.0f%% of captions are longer than the %d tokens that are read, and lose their last %.0f on "
            "average (%d captions counted). Fix: %s",
            *(model, 100 * len(cut) / len(lengths), limit, sum(cut) / len(cut), len(lengths), hint),
        )
