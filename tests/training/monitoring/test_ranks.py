"""Several workers, whatever shards their weights: the grid that they draw is the product's, and none starves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capstan.training.config.monitoring import Fid
from capstan.training.launch import train
from capstan.training.sample import sample


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_shares_are_drawn_with_the_whole_average(recipe, metrics, tmp_path: Path, zero: int) -> None:
    prompts = ["a red square", "a blue square", "a green square"]  # two for one worker, one for the other
    measured = {"every": 2, "count": 9, "batch": 2, "measures": ["oracle", "clip", "fid", "kid", "cmmd"], **metrics}
    watch = {"samples": {"every": 2, "prompts": prompts}, "evaluate": measured, "best": {"measure": "fid"}}
    engine = {"strategy": "deepspeed", "zero": zero, "workers": 2, "launcher": "local"}
    train(recipe(watch=watch, engine=engine))
    run = tmp_path / "run"
    sample(run, prompts, tmp_path / "grid.png")
    ours, theirs = (
        np.asarray(Image.open(path)).astype(int) for path in (run / "samples/step-000004.png", tmp_path / "grid.png")
    )
    assert np.abs(ours - theirs).max() <= 1
    records = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [(record["step"], record["count"]) for record in records] == [(2, 9), (4, 9)]
    best = json.loads((run / "best.json").read_text())
    kept = run / best["folder"] / "checkpoint"
    assert len(list(kept.glob("worker-*.pt"))) == 2

    # One worker alone, on the same product, comes to the same figures.
    from capstan.training.evaluate import evaluate

    network = Fid(**metrics["fid"])
    alone = evaluate(run, count=9, measures=measured["measures"], fid=network)["measures"]
    for name, value in records[-1]["measures"].items():
        assert alone[name]["value"] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    for name, value in records[-1]["ceilings"].items():
        assert alone[name]["ceiling"] == pytest.approx(value, rel=1e-3, abs=1e-3), name
