"""R-precision: how often an image finds its own text among others (Xu et al. 2018, section 4)"""

from __future__ import annotations

from typing import Final

import numpy as np

CANDIDATES: Final = 100  # texts: the image's own, and others drawn at random


def r_precision(similarity: np.ndarray, texts: list[str]) -> dict[str, dict[str, float]]:
    """Return the share of images whose own text is the most similar of its candidates, and chance.

    `similarity` is [N, N], of image i with text j. With fewer than `CANDIDATES` texts all are candidates. A text equal
    to the image's own is no candidate.
    """
    count, found = len(texts), []
    candidates = min(CANDIDATES, count)
    for image in range(count):
        others = np.array([text for text in range(count) if texts[text] != texts[image]], dtype=int)
        drawn = np.random.default_rng(image).permutation(others)[: candidates - 1]
        found.append(float(similarity[image, image] > similarity[image, drawn].max(initial=-np.inf)))
    return {"r_precision": {"value": round(float(np.mean(found)), 4), "chance": round(1 / candidates, 4)}}
