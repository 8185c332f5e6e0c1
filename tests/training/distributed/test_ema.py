"""The average of one process, in closed form; under several see test_engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from capstan.training.distributed.ema import Ema, decay_at


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


def test_what_is_kept_is_the_share_without_what_fills_it_up() -> None:
    shapes = {"w": torch.Size([3]), "b": torch.Size([1])}  # on the second of two workers, under ZeRO 3
    engine = SimpleNamespace(shards=lambda: [torch.ones(2), torch.zeros(1)], shapes=lambda: shapes, rank=1, world=2)
    ema = Ema(engine, 0.9)
    of_w, of_b = ema.slices()
    assert (of_w.name, of_w.start, of_w.tensor.tolist()) == ("w", 2, [1.0])
    assert of_b.tensor.numel() == 0
    of_w.tensor.fill_(5.0)  # is the average itself
    assert ema.shards[0].tolist() == [5.0, 1.0]
    assert list(Ema(engine, None).slices()) == []
