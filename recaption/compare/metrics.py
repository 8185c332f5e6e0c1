"""Captions and embeddings → numbers that compare captions

Standard CLIPs read 77 tokens and judge only the start of a long caption, so captions are scored sentence by sentence.
The mean measures how well a caption fits; the minimum reveals statements about things that are not in the image.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from capstan.recaption.lint.linter import sentences
from capstan.recaption.lint.rules import words

Floats = npt.NDArray[np.float32]

_ROWS: Final = 1024  # of a similarity matrix at a time
OPENER_WORDS: Final = 3
_OPENERS_SHOWN: Final = 5


def chunks(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Split a text into sentences, and sentences that do not fit into as few parts as possible.

    >>> chunks("a cat. a dog and a bird sit there", lambda text: len(text.split()) <= 4)
    ['a cat.', 'a dog and a', 'bird sit there']
    """
    parts: list[str] = []
    for sentence in sentences(text):
        rest = [] if fits(sentence) else sentence.split()
        if not rest:
            parts.append(sentence)
        while rest:
            stop = len(rest)
            while stop > 1 and not fits(" ".join(rest[:stop])):
                stop -= max(1, stop // 8)
            parts.append(" ".join(rest[:stop]))
            rest = rest[stop:]
    return parts


def scores(images: Floats, texts: Floats, owner: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return the mean and minimum [N] over each image's chunks of 100 × the cosine of image and chunk.

    `images` [N, D]; `texts` [M, D]; `owner` [M] is each chunk's image number. Every image has at least one chunk.
    """
    cosine = 100 * (images[owner] * texts).sum(-1)
    count = np.bincount(owner, minlength=len(images))
    mean = np.bincount(owner, weights=cosine, minlength=len(images)) / count
    least = np.full(len(images), np.inf)
    np.minimum.at(least, owner, cosine)
    return mean.astype(np.float32), least.astype(np.float32)


def whole(texts: Floats, owner: npt.NDArray[np.int64], count: int) -> Floats:
    """Return one unit-length embedding per caption [count, D]: the mean of its chunks."""
    total = np.zeros((count, texts.shape[1]), np.float32)
    np.add.at(total, owner, texts)
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)


def wins(a: Floats, b: Floats) -> dict[str, Any]:
    """Return how often a is above b, counting ties as half, with Wilson's 95% interval."""
    n, won = len(a), float((a > b).sum() + (a == b).sum() / 2)
    rate, z = won / n, 1.96
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return {"rate": round(rate, 4), "low": round(middle - half, 4), "high": round(middle + half, 4)}


def neighbours(images: Floats, count: int) -> npt.NDArray[np.int64]:
    """Return each image's `count` nearest neighbours [N, count] by cosine: the hardest to distinguish from it."""
    near = np.empty((len(images), count), np.int64)
    for start in range(0, len(images), _ROWS):
        similar = images[start : start + _ROWS] @ images.T
        rows = np.arange(len(similar))
        similar[rows, start + rows] = -np.inf
        near[start : start + _ROWS] = np.argsort(-similar, axis=1, kind="stable")[:, :count]
    return near


def recall(images: Floats, captions: Floats, near: npt.NDArray[np.int64]) -> float:
    """Return the share of captions closer to their own image than to each of its neighbours; ties count in part.

    Chance is 1 / (1 + neighbours).
    """
    own = (captions * images).sum(-1, keepdims=True)
    others = np.einsum("nd,nkd->nk", captions, images[near])
    ties = np.isclose(others, own, rtol=0, atol=1e-6)
    beaten = ((others > own) & ~ties).any(axis=1)
    return float(np.where(beaten, 0.0, 1 / (1 + ties.sum(axis=1))).mean())


def lengths(texts: Sequence[str]) -> dict[str, float]:
    """Return the mean and percentiles of words per caption."""
    counts = np.array([len(text.split()) for text in texts])
    p10, p50, p90 = np.percentile(counts, [10, 50, 90]).tolist()
    return {"mean": round(float(counts.mean()), 2), "p10": p10, "p50": p50, "p90": p90}


def openers(texts: Sequence[str]) -> dict[str, Any]:
    """Return the diversity of the first three words: entropy in bits, its maximum, and the commonest openers."""
    counted = Counter(" ".join(words(text)[:OPENER_WORDS]) for text in texts)
    shares = np.array(list(counted.values())) / len(texts)
    return {
        "entropy_bits": round(float(-(shares * np.log2(shares)).sum()) + 0.0, 3),
        "most_bits": round(math.log2(len(texts)), 3),
        "commonest": {text: round(n / len(texts), 4) for text, n in counted.most_common(_OPENERS_SHOWN)},
    }


def style(texts: Sequence[str]) -> dict[str, float]:
    """Return shares of habits that text-to-image models overfit: lower case, and a full stop at the end."""
    lower = sum(text == text.lower() for text in texts)
    stops = sum(text.rstrip().endswith(".") for text in texts)
    return {"lower_case": round(lower / len(texts), 4), "full_stop": round(stops / len(texts), 4)}
