"""What was not logged yet at a checkpoint is logged by the run that goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from capstan.training.config import TrainConfig
from capstan.training.distributed.engine import Engine
from capstan.training.family import PerSampleLoss
from capstan.training.monitoring.metrics_logger import MetricsLogger
from capstan.training.run import Run


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[Callable[[int], MetricsLogger]]:
    """`meter(bands)`: of a run that tells losses apart by so many bands."""
    section = {"model": "x:X", "run": str(tmp_path), "steps": 4, "engine": {"strategy": "ddp"}}
    trains = {bands: TrainConfig.model_validate({**section, "watch": {"bands": bands}}) for bands in (2, 4)}
    engine = Engine(trains[2])
    yield lambda bands: MetricsLogger(engine, Run(trains[bands]), "tiny")
    engine.close()


def step(meter: MetricsLogger, value: float) -> None:
    values = torch.full((2,), value)
    meter.add({"loss": value, "loss_by_time": PerSampleLoss(values, torch.tensor([0.1, 0.9]))})
    meter.step({})


@pytest.mark.parametrize(
    ("bands", "by_time"),
    [(2, {"0.00-0.50": 2.0, "0.50-1.00": 2.0}), (4, {"0.00-0.25": 3.0, "0.75-1.00": 3.0})],  # what four cannot take up
)
def test_bands_may_be_other_ones_when_a_run_goes_on(meter, tmp_path: Path, bands: int, by_time: dict) -> None:
    before, after = meter(2), meter(bands)
    before.start(0, {}, {})
    step(before, 1.0)
    after.start(1, before.state(), before.shared_state())
    step(after, 3.0)
    after.log(2, {"lr": 0.1})
    (record,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert record["loss_by_time"] == by_time
    assert record["loss"] == 2.0
    for meter_ in (before, after):
        meter_.close()
