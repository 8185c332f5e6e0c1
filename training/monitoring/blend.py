"""Captions shown → a warning if their blend is far from the recipe's"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

TOLERANCE: Final = 0.1  # difference of a slot's share, beyond what chance explains


def blend_warning(shown: Mapping[str, int], weights: Mapping[str, float]) -> str:
    """Return what to warn of; "" if the captions shown (slot → count) match the recipe's weights (slot → weight).

    A sample without a caption in its slot shows its original caption, so a layer with gaps shifts the blend.

    >>> blend_warning({"original": 4, "descriptive": 96}, {"original": 0.05, "descriptive": 0.95})
    ''
    """
    count, total = sum(shown.values()), sum(weights.values())
    if not count or not total:
        return ""
    tolerance = TOLERANCE + 1.5 / math.sqrt(count)
    shares = {slot: (weights.get(slot, 0) / total, shown.get(slot, 0) / count) for slot in sorted({*weights, *shown})}
    if all(abs(wanted - real) <= tolerance for wanted, real in shares.values()):
        return ""
    real = ", ".join(f"{slot} {share[1]:.0%} (recipe: {share[0]:.0%})" for slot, share in shares.items())
    return (
        f"the captions shown so far are {real}; complete the layer with `capstan recaption`, or change train.data.blend"
    )
