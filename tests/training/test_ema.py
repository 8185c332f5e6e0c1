"""The average of one process, in closed form; under several see test_engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from training.ema import Ema, decay_at


def test_average_follows_the_weights_with_a_warm_start() -> None:
    weights = [torch.tensor([1.0, 2.0])]
    ema = Ema(SimpleNamespace(shards=lambda: weights, gather=lambda shards: {"w": shards[0]}), 0.9)
    expected = weights[0].clone()
    for step in range(200):
        weights[0] += 1.0
        ema.update(step)
        expected = torch.lerp(expected, weights[0], 1 - decay_at(0.9, step))
    assert torch.equal(ema.gather()["w"], expected)
    assert (weights[0] - expected)[0] == pytest.approx(0.9 / 0.1, rel=0.01)  # the lag behind a slope of one a step


def test_without_a_decay_the_average_is_the_weights() -> None:
    weights = [torch.tensor([1.0])]
    ema = Ema(SimpleNamespace(shards=lambda: weights, gather=lambda shards: {"w": shards[0]}), None)
    weights[0] += 1.0
    ema.update(0)
    assert ema.gather()["w"].item() == 2.0


def test_state_comes_back() -> None:
    engine = SimpleNamespace(shards=lambda: [torch.ones(3)])
    before, after = Ema(engine, 0.9), Ema(engine, 0.9)
    before.shards[0] *= 5
    after.restore(before.state())
    assert torch.equal(after.shards[0], before.shards[0])
