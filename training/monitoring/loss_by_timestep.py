"""Per-sample losses by timestep.

They are summed on their device, so that no step waits for it.
A mean loss hides whether it falls at noisy times, at clean times or at both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from capstan.training.family import PerSampleLoss


def sums(spread: PerSampleLoss, bands: int) -> torch.Tensor:
    """Return [2, bands] float32 on the device: per band, an equal part of [0, 1], sum and number of the values.

    Places outside [0, 1] go to the nearest band. Computed as a product with a 0/1 matrix, which is bit-reproducible.
    """
    band = (spread.places.float() * bands).long().clamp(0, bands - 1)
    within = (band[:, None] == torch.arange(bands, device=band.device)).float()  # [B, bands]
    return torch.stack([spread.values.detach().float() @ within, within.sum(0)])


def means(totals: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return band → mean from the workers' `sums`, without bands that have no sample.

    >>> means([torch.tensor([[3.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 5.0], [1.0, 4.0]])])
    {'0.00-0.50': 1.0, '0.50-1.00': 1.25}
    """
    summed, counts = torch.stack([total.cpu().double() for total in totals]).sum(0)
    rows = zip(summed.tolist(), counts.tolist(), strict=True)
    bands = len(counts)
    return {f"{n / bands:.2f}-{(n + 1) / bands:.2f}": value / count for n, (value, count) in enumerate(rows) if count}
