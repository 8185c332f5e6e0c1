"""Estimates of what a recipe needs: bytes on disk, bytes of GPU memory"""

from __future__ import annotations

from typing import Final

from capstan.pipeline.config import Recipe
from capstan.training.config import TrainConfig
from capstan.training.config.families import family_class

# Quality → bytes of a JPEG per pixel, measured on photographs; interpolated in between.
_JPEG: Final = ((75, 0.16), (85, 0.24), (90, 0.31), (95, 0.46), (100, 1.1))
_ASPECT: Final = 1.35  # longer side to shorter side, typically
_COPIES: Final = 2.1  # staged images and shards, and their tables
_KEPT_ROWS: Final = 0.6  # of web rows; many URLs are dead


def disk_bytes(recipe: Recipe, rows: int) -> int:
    """Return the most bytes that building a dataset of the given number of rows takes."""
    share = _KEPT_ROWS if recipe.source is not None and recipe.source.image is None else 1.0
    return int(rows * share * image_bytes(recipe) * _COPIES)


def image_bytes(recipe: Recipe) -> float:
    """Return the bytes that one sample takes in a shard: its JPEG, its JSON and caption, its row of the table."""
    side, image = recipe.image.size, recipe.image
    pixels = side * side * (_ASPECT if image.resize == "keep_ratio" else 1.0)
    if image.resize == "none":
        pixels = 1024 * 768
    return pixels * _jpeg_bytes(image.quality) + 2048


def _jpeg_bytes(quality: int) -> float:
    before = _JPEG[0]
    for after in _JPEG:
        if quality <= after[0]:
            span = max(after[0] - before[0], 1)
            return before[1] + (after[1] - before[1]) * max(0, quality - before[0]) / span
        before = after
    return _JPEG[-1][1]


def parameters(train: TrainConfig) -> int | None:
    """Return the number of trainable parameters of the recipe's model, without allocating it.

    None if only the files of its weights tell.
    """
    import torch

    with torch.device("meta"):
        model = family_class(train.model).untrained(train)
    return None if model is None else sum(parameter.numel() for parameter in model.parameters())


def state_bytes(train: TrainConfig, count: int) -> int:
    """Return the bytes per worker of weights, gradients, optimizer and average for `count` parameters.

    Activations come on top. ZeRO 1 shares the optimizer's part (and the average) between workers, 2 the gradients
    too, 3 the weights too (Rajbhandari et al. 2020, figure 1). All are kept in fp32.
    """
    zero = train.engine.zero if train.engine.strategy == "deepspeed" else 0
    workers = train.engine.least
    weights = 4 * count / (workers if zero >= 3 else 1)
    gradients = 4 * count / (workers if zero >= 2 else 1)
    optimizer = (8 + (4 if train.ema is not None else 0)) * count / (workers if zero >= 1 else 1)
    return int(weights + gradients + optimizer)
