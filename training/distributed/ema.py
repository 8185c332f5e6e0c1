"""Weights → their exponential moving average, sharded over the workers as evenly as ZeRO shards its optimizer.

Each worker averages its own share of every weight, whatever the ZeRO stage: a stage that holds whole weights gives a
slice of them, stage 3 the part that it holds. The whole average is put together only to be written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from capstan.training.distributed.engine import Engine
from capstan.training.distributed.state import AVERAGE, StateSlice


def decay_at(decay: float, step: int) -> float:
    """The decay after `step` steps: (1 + t) / (10 + t) at first, so that the random start is soon forgotten.

    The warm-up of TensorFlow's ExponentialMovingAverage.

    >>> round(decay_at(0.999, 0), 3), decay_at(0.999, 10**6)
    (0.1, 0.999)
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """The average of `engine`'s weights, on the engine's device in fp32. `decay` None: the present weights."""

    def __init__(self, engine: Engine, decay: float | None) -> None:
        self.engine, self.decay = engine, decay
        self.shards = [] if decay is None else [shard.float().clone() for shard in engine.shards()]

    def update(self, step: int) -> None:
        """Take the weights in after `step` steps were made: average ← d·average + (1 − d)·weights."""
        if self.decay is None or not self.shards:
            return
        with torch.no_grad():
            present = [shard.float() for shard in self.engine.shards()]
            torch._foreach_lerp_(self.shards, present, 1.0 - decay_at(self.decay, step))

    def gather(self) -> dict[str, torch.Tensor] | None:
        """The whole average, name → fp32 tensor on the CPU, on rank 0; None elsewhere. Call it on every worker."""
        return self.engine.gather(self.engine.shards() if self.decay is None else self.shards)

    def parts(self) -> Iterator[StateSlice]:
        """This worker's share, live, by the weights' names: what it writes and what it has to read."""
        for (name, shape), shard in zip(self.engine.shapes().items(), self.shards, strict=bool(self.shards)):
            start = self.engine.rank * -(-shape.numel() // self.engine.world)
            held = max(0, min(shard.numel(), shape.numel() - start))  # ZeRO 3 fills the last shares up
            yield StateSlice(AVERAGE, name, start, shard[:held])
