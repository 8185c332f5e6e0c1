"""One worker of test_engine: trains a small model under every strategy, saves in the middle, and goes back there.

Usage: engine_worker.py train|resume FOLDER FROM PORT,PORT,...

`train` begins, and leaves FOLDER/NAME with a checkpoint and seen.pt for every strategy; `resume` takes up the
checkpoint of FROM/NAME on as many workers as there are now, saves it again as it is, and trains to the end.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from capstan.training.config import TrainConfig
from capstan.training.distributed import engine as engine_module
from capstan.training.distributed.checkpoint import Checkpoints
from capstan.training.distributed.ema import Ema
from capstan.training.distributed.engine import Engine

STEPS, SAVE_AT, BATCH, PARTS = 6, 3, 16, 2
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    **{f"zero{stage}": {"zero": stage} for stage in range(4)},
    "offload1": {"zero": 1, "offload": True},
    "offload2": {"zero": 2, "offload": True},
    "offload3": {"zero": 3, "offload": True},
    "channels_last": {"strategy": "ddp", "channels_last": True},
}
HALF = {
    "fp16-ddp": {"strategy": "ddp"},
    "fp16-zero0": {"zero": 0},
    "fp16-zero2": {"zero": 2},
    "fp16-zero3": {"zero": 3},
}
BF16 = {f"bf16-zero{stage}": {"zero": stage, "threads": 1} for stage in (2, 3)}  # by which bf16 is rounded


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(2, 8, 2, bias=False)
    layers = [torch.nn.Linear(8, 33), torch.nn.GELU(), torch.nn.LayerNorm(33), torch.nn.Linear(33, 3)]
    return torch.nn.Sequential(torch.nn.Unflatten(1, (2, 2, 2)), convolution, torch.nn.Flatten(), *layers)


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].sin()


def config(engine: dict[str, Any], run: str, workers: int, precision: str = "fp32") -> TrainConfig:
    section = {"model": "x:X", "run": run, "steps": STEPS, "batch": BATCH, "accumulate": PARTS, "lr": 0.01}
    section |= {"clip": 0.05, "ema": 0.9, "precision": precision, "engine": {**engine, "workers": workers}}
    return TrainConfig.model_validate(section)


class Training:
    """The loop of training.trainer, without a family and without data."""

    def __init__(self, train: TrainConfig) -> None:
        self.engine = Engine(train)
        self.model = self.engine.prepare(make_model())
        self.ema = Ema(self.engine, train.ema)
        self.norms: list[float] = []

    def steps(self, first: int, last: int) -> None:
        engine, share = self.engine, BATCH // self.engine.world
        for number in range(first, last):
            engine.set_lr(0.01)
            x, y = (tensor[engine.rank * share :][:share].to(engine.device) for tensor in batch_of(number))
            for part, (x_part, y_part) in enumerate(zip(x.chunk(PARTS), y.chunk(PARTS), strict=True)):
                with engine.computing():
                    loss = (self.model(x_part).float() - y_part).square().mean()
                norm = engine.backward(loss, last=part == PARTS - 1)
            self.norms.append(float(norm))
            self.ema.update(number)

    def checkpoints(self, folder: Path) -> Checkpoints:
        train = self.engine.train.model_copy(update={"run": str(folder)})
        return Checkpoints(train, self.engine, self.ema)

    def seen(self) -> dict[str, Any]:
        return {"weights": self.engine.gather(self.engine.shards()), "average": self.ema.gather(), "norms": self.norms}


def train(training: Training, folder: Path) -> None:
    """Begin, save in the middle, end; then go back to the middle: the end is the same, bit for bit."""
    engine, checkpoints = training.engine, training.checkpoints(folder)
    if engine.loss_scale is not None:
        overflow(training)
    training.steps(0, SAVE_AT)
    checkpoints.save(SAVE_AT, {"mine": [engine.rank]}, {"ours": "x"})
    training.steps(SAVE_AT, STEPS)
    seen = training.seen()
    if engine.is_main:
        torch.save(seen, folder / "seen.pt")
    step, worker, shared = checkpoints.load()
    assert (step, worker, shared["ours"]) == (SAVE_AT, {"mine": [engine.rank]}, "x")
    training.steps(SAVE_AT, STEPS)
    again = training.seen()
    assert engine.loss_scale is None or (engine.loss_scale.scale, engine.loss_scale.good) == (2.0**10, STEPS)
    for kind in ("weights", "average") if engine.is_main else ():
        assert all(torch.equal(tensor, again[kind][name]) for name, tensor in seen[kind].items()), (folder, kind)
    assert engine.raised(engine.rank == engine.world - 1, False) == (True, False)
    assert engine.collect(engine.rank) == list(range(engine.world))


def overflow(training: Training) -> None:
    """A gradient beyond fp16's largest number: the step is left out, and the scale is halved."""
    scale = training.engine.loss_scale
    scale.scale = 2.0**40
    training.steps(0, 1)
    assert training.norms == [float("inf")]
    assert training.engine.skipped
    assert scale.scale == 2.0**39
    scale.scale = 2.0**10
    training.norms.clear()


def resume(training: Training, folder: Path, before: Path) -> None:
    """Take up what other workers left, leave it as it is for others again, and train to the end."""
    step, worker, _ = training.checkpoints(before).load()
    given = [rank for mine in training.engine.collect(worker) for rank in mine.get("mine", [])]
    assert given == list(range(3 - training.engine.world))  # nobody's is lost, nobody's counted twice
    training.checkpoints(folder).save(step, {"mine": [training.engine.rank]}, {})
    training.steps(step, STEPS)
    if (seen := training.seen()) and training.engine.is_main:
        torch.save(seen, folder / "seen.pt")


def main(phase: str, folder: Path, before: Path, ports: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    engine_module._has_fp16 = lambda device: True  # slow on a CPU, but the same arithmetic
    jobs = [(name, section, "fp32") for name, section in STRATEGIES.items()]
    jobs += [(name, section, "fp16") for name, section in HALF.items()]
    jobs += [(name, section, "bf16") for name, section in BF16.items()]
    for (name, section, precision), port in zip(jobs, ports, strict=True):
        os.environ |= {"MASTER_PORT": port, "LOCAL_RANK": os.environ["RANK"]}
        training = Training(config(section, str(folder / name), int(os.environ["WORLD_SIZE"]), precision))
        if phase == "train":
            train(training, folder / name)
        else:
            resume(training, folder / name, before / name)
        training.engine.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4].split(","))
