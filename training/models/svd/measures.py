"""How well clips continue images: is the first frame kept, are the things in the last one, do things move as asked?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from capstan.pipeline.world.captions import overlap
from capstan.pipeline.world.moving.oracle import watch
from capstan.pipeline.world.oracle import parse
from capstan.training.data.transforms import psnr, to_signed

Row = Mapping[str, float]


def first_frame(clips: np.ndarray, images: np.ndarray) -> Row:
    """Return the PSNR in dB of first frames and the images that they continue; chance: and the next clip's image.

    `clips` are uint8 [N, frames, H, W, 3], `images` uint8 [N, H, W, 3].
    """
    return {name: _psnr(clips[:, 0], true) for name, true in _with_chance(images)}


def last_colours(clips: np.ndarray, images: np.ndarray) -> Row:
    """Return the share of the images' things of which the last frames have one of this colour (moving world).

    Nan where no image has a thing that the world's oracle knows.
    """
    found = [[thing.colour for thing in parse(clip[-1]).things] for clip in clips]

    def kept(images: np.ndarray) -> float:
        wanted = [[thing.colour for thing in parse(image).things] for image in images]
        shares = [overlap(one, names) for one, names in zip(found, wanted, strict=True) if names]
        return float(np.mean(shares)) if shares else math.nan

    return {name: kept(true) for name, true in _with_chance(images)}


def moved(clips: np.ndarray, buckets: Sequence[int]) -> Row:
    """Return Spearman's correlation of motion buckets and moved distance (moving world).

    The distance of a clip is that of the thing that moves farthest, followed by its colour. Chance is 0.
    """
    distances = [max((thing.distance for thing in watch(clip).things), default=0.0) for clip in clips]
    return {"value": spearman(buckets, distances), "chance": 0.0}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation, equal values with their mean rank; nan if one side does not vary."""
    ranks = [_ranks(np.asarray(side, np.float64)) for side in (a, b)]
    if any(side.std() == 0 for side in ranks):
        return math.nan
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: np.ndarray = ends - (counts - 1) / 2
    return means[place]


def _with_chance(images: np.ndarray) -> tuple[tuple[str, np.ndarray], ...]:
    return ("value", images), ("chance", np.roll(images, -1, axis=0))


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    sides = (to_signed(torch.from_numpy(np.ascontiguousarray(side))) for side in (a, b))
    return float(psnr(*sides).mean())
