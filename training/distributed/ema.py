"""Weights → their exponential moving average, sharded over the workers

Each worker averages its own share of every weight: a slice if it holds whole weights, or its part under ZeRO stage 3.
The whole average is gathered only to be written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from capstan.training.distributed.engine import Engine
from capstan.training.distributed.state import AVERAGE, StateSlice


def decay_at(decay: float, step: int) -> float:
    """Return the decay after `step` steps: at first (1 + t) / (10 + t), so that the random start is soon forgotten.

    The warm-up of TensorFlow's ExponentialMovingAverage.

    >>> round(decay_at(0.999, 0), 3), decay_at(0.999, 10**6)
    (0.1, 0.999)
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """The average of `engine`'s weights, on the engine's device in fp32. With `decay` None, the current weights."""

    def __init__(self, engine: Engine, decay: float | None) -> None:
        self.engine, self.decay = engine, decay
        self.shards = [] if decay is None else [shard.float().clone() for shard in engine.shards()]

    def update(self, step: int) -> None:
        """Update the average after `step` steps: average ← d·average + (1 − d)·weights."""
        if self.decay is None or not self.shards:
            return
        with torch.no_grad():
            current = [shard.float() for shard in self.engine.shards()]
            torch._foreach_lerp_(self.shards, current, 1.0 - decay_at(self.decay, step))

    def gather(self) -> dict[str, torch.Tensor] | None:
        """Return the whole average (name → fp32 CPU tensor) on rank 0, None elsewhere. Call it on every worker."""
        return self.engine.gather(self.engine.shards() if self.decay is None else self.shards)

    def slices(self) -> Iterator[StateSlice]:
        """Yield this worker's share of each weight's average, by the weight's name, for saving and loading."""
        for (name, shape), shard in zip(self.engine.shapes().items(), self.shards, strict=bool(self.shards)):
            start = self.engine.rank * -(-shape.numel() // self.engine.world)
            held = max(0, min(shard.numel(), shape.numel() - start))  # ZeRO 3 pads the last shares
            yield StateSlice(AVERAGE, name, start, shard[:held])
