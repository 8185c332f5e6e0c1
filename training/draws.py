"""Random numbers that belong to samples, not to parts or workers

A step of 8 samples on 2 workers in 2 parts draws for each sample what one worker in one part draws for it: every sample
has its own generator, seeded by (seed, step, place in the step's batch). So noise, times and dropped captions depend on
the recipe alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from capstan.training.data.order import hash64


class SampleDraws(torch.Generator):
    """A generator with one more for each sample of a part (`rows`), which the functions below draw from."""

    rows: Sequence[torch.Generator]


def draws_of(device: torch.device, seed: int, step: int, places: range) -> SampleDraws:
    """Return the generators of the samples at `places` in the batch of step `step`."""
    draws = SampleDraws(device)
    draws.manual_seed(hash64(seed, "draw", step, places.start, places.stop) >> 1)
    draws.rows = [torch.Generator(device) for _ in places]
    for place, row in zip(places, draws.rows, strict=True):
        row.manual_seed(hash64(seed, "draw", step, place) >> 1)
    return draws


def normal(shape: Sequence[int], draw: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draw [B, ...] ~ N(0, 1), on the generator's device."""
    return _draw(shape, draw, lambda size, one: torch.randn(size, generator=one, device=one.device, dtype=dtype))


def uniform(shape: Sequence[int], draw: torch.Generator) -> torch.Tensor:
    """Draw [B, ...] ~ U(0, 1), float32, on the generator's device."""
    return _draw(shape, draw, lambda size, one: torch.rand(size, generator=one, device=one.device))


def integers(high: int, count: int, draw: torch.Generator) -> torch.Tensor:
    """Draw [count] of 0 … high − 1, int64, on the generator's device."""
    return _draw((count,), draw, lambda size, one: torch.randint(high, size, generator=one, device=one.device))


def _draw(
    shape: Sequence[int], draw: torch.Generator, one: Callable[[tuple[int, ...], torch.Generator], torch.Tensor]
) -> torch.Tensor:
    """Draw row by row from the samples' generators; from `draw` itself if it has none, or not one for each row."""
    if not isinstance(draw, SampleDraws) or len(draw.rows) != shape[0]:
        return one(tuple(shape), draw)
    return torch.stack([one(tuple(shape[1:]), row) for row in draw.rows])
