"""Losses told apart by timestep."""

from __future__ import annotations

import pytest
import torch

from capstan.training.family import PerSampleLoss
from capstan.training.monitoring.loss_by_timestep import means, sums


def test_values_go_to_the_band_of_their_place():
    spread = PerSampleLoss(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0.0, 0.24, 0.25, 1.0]))
    assert sums(spread, 4).tolist() == [[4.0, 5.0, 0.0, 7.0], [2.0, 1.0, 0.0, 1.0]]
    assert means([sums(spread, 4)]) == {"0.00-0.25": 2.0, "0.25-0.50": 5.0, "0.75-1.00": 7.0}


def test_parts_and_workers_add_up():
    draw = torch.Generator().manual_seed(0)
    values, places = torch.rand(64, generator=draw), torch.rand(64, generator=draw)
    whole = means([sums(PerSampleLoss(values, places), 5)])
    parts = means([sums(PerSampleLoss(v, p), 5) for v, p in zip(values.chunk(4), places.chunk(4), strict=True)])
    assert parts == pytest.approx(whole)
    assert sum(whole.values()) / 5 == pytest.approx(float(values.mean()), abs=0.1)
