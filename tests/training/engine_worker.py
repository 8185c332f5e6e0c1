"""One worker of test_engine: trains a small model for six steps, saves in the middle, and goes back there.

Usage: engine_worker.py STRATEGY ZERO OUT. Rank 0 writes what it has seen to OUT.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.ema import Ema
from training.engine import Engine

STEPS, SAVE_AT, BATCH, PARTS = 6, 3, 16, 2


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 33), torch.nn.GELU(), torch.nn.LayerNorm(33), torch.nn.Linear(33, 3)]
    return torch.nn.Sequential(*layers)


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].sin()


def config(strategy: str, zero: int, run: str, workers: int) -> TrainConfig:
    engine: dict[str, Any] = {"strategy": strategy, "workers": workers}
    engine |= {"zero": zero} if strategy == "deepspeed" else {}
    section = {"model": "x:X", "run": run, "steps": STEPS, "batch": BATCH, "accumulate": PARTS, "lr": 0.01}
    return TrainConfig.model_validate({**section, "clip": 0.05, "ema": 0.9, "engine": engine})


def main(strategy: str, zero: int, out: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    world = int(os.environ["WORLD_SIZE"])
    engine = Engine(config(strategy, zero, str(out.parent), world))
    model = engine.prepare(make_model())
    ema = Ema(engine, engine.train.ema)
    checkpoints = Checkpoints(engine.train, engine, ema)
    norms = []

    def step(number: int) -> None:
        engine.set_lr(0.01)
        share = BATCH // engine.world
        x, y = (tensor[engine.rank * share :][:share] for tensor in batch_of(number))
        for part, (x_part, y_part) in enumerate(zip(x.chunk(PARTS), y.chunk(PARTS), strict=True)):
            loss = (model(x_part) - y_part).square().mean()
            norm = engine.backward(loss, last=part == PARTS - 1)
        norms.append(float(norm))
        ema.update(number)

    for number in range(STEPS):
        if number == SAVE_AT:
            checkpoints.save(number, {"mine": engine.rank}, {"ours": "x"})
        step(number)
    weights, average = engine.gather(engine.shards()), ema.gather()
    first, worker, shared = checkpoints.load()
    assert (first, worker, shared["ours"]) == (SAVE_AT, {"mine": engine.rank}, "x")
    for number in range(first, STEPS):
        step(number)
    again, average_again = engine.gather(engine.shards()), ema.gather()
    assert engine.raised(engine.rank == engine.world - 1, False) == (True, False)
    assert engine.collect(engine.rank) == list(range(engine.world))
    if engine.is_main:
        torch.save({"weights": weights, "average": average, "norms": norms[:STEPS]}, out)
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        assert all(torch.equal(average[name], average_again[name]) for name in average)
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
