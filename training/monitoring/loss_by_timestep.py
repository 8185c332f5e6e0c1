"""Losses of single samples, told apart by timestep: summed on their device, so that no step waits for a GPU.

A run's mean loss hides that it falls at noisy times and stands still at clean ones, or the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from capstan.training.family import PerSampleLoss


def sums(spread: PerSampleLoss, bands: int) -> torch.Tensor:
    """[2, bands] float32 on the device: the sum of the values in each of so many equal parts of [0, 1], and how many.

    Places outside go to the nearest band. A product with a 0/1 matrix: the same bits whenever it is computed.
    """
    band = (spread.places.float() * bands).long().clamp(0, bands - 1)
    within = (band[:, None] == torch.arange(bands, device=band.device)).float()  # [B, bands]
    return torch.stack([spread.values.detach().float() @ within, within.sum(0)])


def means(totals: Sequence[torch.Tensor]) -> dict[str, float]:
    """Workers' `sums` → band → mean, without the bands that no sample fell into.

    >>> means([torch.tensor([[3.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 5.0], [1.0, 4.0]])])
    {'0.00-0.50': 1.0, '0.50-1.00': 1.25}
    """
    summed, counts = torch.stack([total.cpu().double() for total in totals]).sum(0)
    found = zip(summed.tolist(), counts.tolist(), strict=True)
    bands = len(counts)
    return {f"{n / bands:.2f}-{(n + 1) / bands:.2f}": value / count for n, (value, count) in enumerate(found) if count}
