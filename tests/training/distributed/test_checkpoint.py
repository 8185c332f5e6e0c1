"""Checkpoints of one process: complete or absent, the newest kept. Several processes: see test_engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.training.config import TrainConfig
from capstan.training.distributed.checkpoint import MARK, Checkpoints, complete, merged
from capstan.training.distributed.ema import Ema
from capstan.training.distributed.engine import Engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine with a small model, whose run folder is `tmp_path`."""
    section = {"model": "x:X", "run": str(tmp_path), "steps": 9, "batch": 4, "engine": {"strategy": "ddp"}}
    engine = Engine(TrainConfig.model_validate({**section, "checkpoint": {"keep": 2}}))
    torch.manual_seed(0)
    engine.prepare(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)))
    yield engine
    engine.close()


def step(engine: Engine, number: int) -> None:
    engine.set_lr(0.1)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
    engine.backward(engine.model(x).square().mean(), last=True)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    module = engine.model
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def save_steps(engine: Engine, *numbers: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Train and save a checkpoint after each step of `numbers`; return the weights of each."""
    states, ema = [], Ema(engine, 0.9)
    checkpoints = Checkpoints(engine.train, engine, ema, **options)
    for number in numbers:
        step(engine, number)
        checkpoints.save(number, {"n": number}, {"name": f"at {number}"})
        states.append(weights(engine))
    return states


def test_the_newest_comes_back_whole_and_the_older_ones_go(engine: Engine, tmp_path: Path) -> None:
    *_, last = save_steps(engine, 1, 2, 3)
    assert [path.name for path in complete(tmp_path / "checkpoints")] == ["step-000002", "step-000003"]
    step(engine, 4)
    number, worker, shared = Checkpoints(engine.train, engine, Ema(engine, 0.9)).load()
    assert (number, worker, shared["name"]) == (3, {"n": 3}, "at 3")
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights(engine).items())


def test_an_unfinished_one_does_not_count(engine: Engine, tmp_path: Path) -> None:
    save_steps(engine, 1, 2)
    (tmp_path / "checkpoints" / "step-000002" / MARK).unlink()
    assert Checkpoints(engine.train, engine, Ema(engine, 0.9)).load()[0] == 1


def test_one_that_is_being_uploaded_stays(engine: Engine, tmp_path: Path) -> None:
    save_steps(engine, 1, 2, 3, in_use=lambda path: path.name == "step-000001")
    assert len(complete(tmp_path / "checkpoints")) == 3


def test_the_mark_holds_plain_facts(engine: Engine, tmp_path: Path) -> None:
    save_steps(engine, 2)
    mark = json.loads((tmp_path / "checkpoints" / "step-000002" / MARK).read_text())
    assert (mark["step"], mark["samples"]) == (2, 8)
    assert mark["engine"] == {"strategy": "ddp", "zero": 0, "workers": 1}


def test_without_any_a_run_starts_at_zero(engine: Engine) -> None:
    assert Checkpoints(engine.train, engine, Ema(engine, 0.9)).load() == (0, {}, {})


def test_states_of_workers_are_merged() -> None:
    states = [{"a": torch.ones(2), "b": [1]}, {"a": torch.ones(2), "c": 5}]
    total = merged(states)
    assert total["a"].tolist() == [2.0, 2.0]
    assert (total["b"], total["c"]) == ([1], 5)
