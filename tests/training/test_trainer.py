"""Runs from a recipe to a product, in one process: a stopped and resumed run ends like an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from repo import HELPERS
from tiny_runs import assert_same, make_recipe, records, wait_for_step, weights

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.training.config import TrainConfig
from capstan.training.trainer import fit, learning_rate, main


@pytest.fixture(autouse=True, scope="module")
def _importable() -> Iterator[None]:
    """Workers find the tiny family as this process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HELPERS))
        yield


@pytest.fixture
def recipe(squares: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe(name, key=value, ...)` trains the tiny family in the folder `name`."""
    return lambda run="run", **section: make_recipe(squares, tmp_path / run, **section)


def test_a_run_ends_with_its_product_and_is_not_trained_again(recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = fit(recipe())
    assert (summary["steps"], summary["samples"], summary["stopped"]) == (12, 96, False)
    assert [record["step"] for record in records(run)] == list(range(1, 13))
    assert records(run)[-1]["loss"] < records(run)[0]["loss"]
    assert records(run)[-1]["blend"] == {"original": 1.0}
    assert {"lr", "grad_norm", "epoch", "samples", "worst"} <= records(run)[-1].keys()
    assert weights(run)["seen"] == 96
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    assert list((run / "tensorboard").iterdir())
    assert "DDP, world size 1" in (run / "train.log").read_text()
    before = (run / "product" / "weights.pt").stat().st_mtime_ns
    assert fit(recipe())["steps"] == 12
    assert (run / "product" / "weights.pt").stat().st_mtime_ns == before


def test_a_stopped_run_goes_on_as_if_it_had_not_been(recipe, tmp_path: Path) -> None:
    fit(recipe("whole"))
    slow = recipe(tiny={"sleep_s": 0.1})
    run = tmp_path / "run"
    timer = threading.Thread(target=lambda: (wait_for_step(run, 6), os.kill(os.getpid(), signal.SIGTERM)))
    timer.start()
    summary = fit(slow)
    timer.join()
    assert summary["stopped"]
    assert 6 <= summary["steps"] < 12
    assert not (run / "product").exists()
    assert fit(slow)["steps"] == 12
    assert_same(run, tmp_path / "whole")


def test_a_stop_that_a_killed_launcher_left_is_not_obeyed(recipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    (tmp_path / "recipe.yaml").write_text(recipe().model_dump_json())
    assert main([str(tmp_path / "recipe.yaml")]) == 0  # as torchrun starts it


def test_a_run_may_be_made_longer(recipe, tmp_path: Path) -> None:
    constant = {"schedule": "constant", "log_every": 5}
    fit(recipe("whole", **constant))
    fit(recipe(**constant, steps=7))
    assert fit(recipe(**constant))["steps"] == 12
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    by_step = {record["step"]: record["loss"] for record in records(tmp_path / "run")}
    assert by_step[12] == records(tmp_path / "whole")[-1]["loss"]


def test_parts_of_a_batch_add_up(recipe, tmp_path: Path) -> None:
    fit(recipe(steps=3, accumulate=4))
    assert len(records(tmp_path / "run")) == 3


def test_a_run_of_another_recipe_is_not_touched(recipe) -> None:
    fit(recipe(steps=2))
    with pytest.raises(RecipeError, match=r"train\.run: .*different: lr"):
        fit(recipe(steps=2, lr=0.5))


def test_weights_to_start_from(recipe, tmp_path: Path) -> None:
    fit(recipe("first"))
    fit(recipe("second", init=str(tmp_path / "first"), steps=1, lr=1e-9, ema=None))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert torch.allclose(first["head.weight"], second["head.weight"], atol=1e-6)
    with pytest.raises(RecipeError, match=r"train\.init"):
        fit(recipe("third", init=str(tmp_path / "nothing")))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_batch(recipe, tmp_path: Path) -> None:
    with pytest.raises(CapstanError, match="not finite at step"):
        fit(recipe(tiny={"explode_at": 33}))
    (report,) = (tmp_path / "run").glob("bad-step-*.json")
    content = json.loads(report.read_text())
    assert content["loss"] == "nan"
    assert len(content["keys"]) == 8
    assert not (tmp_path / "run" / "product").exists()


def test_a_loss_that_stays_high_ends_the_run_and_names_the_batches(recipe, tmp_path: Path) -> None:
    with pytest.raises(CapstanError, match=r"diverges: at step 31 .* above 5 × its median"):
        fit(recipe(steps=60, tiny={"rise_at": 28}, diverged={"factor": 5, "steps": 4}))
    (report,) = (tmp_path / "run").glob("diverged-step-000031-*.json")
    content = json.loads(report.read_text())
    assert [step["step"] for step in content["steps"]] == [28, 29, 30, 31]
    assert {len(step["keys"]) for step in content["steps"]} == {8}
    assert content["median"] < content["loss"] / 5
    assert not (tmp_path / "run" / "product").exists()


def test_half_precision_that_a_cpu_has_not_is_refused(recipe) -> None:
    with pytest.raises(RecipeError, match=r"train\.precision: fp16 requires a GPU.*bf16"):
        fit(recipe(precision="fp16"))


def test_learning_rate_rises_and_falls() -> None:
    section = {"model": "x:X", "run": "r", "steps": 110, "warmup": 10, "lr": 2.0, "final_lr": 0.1}
    by_name = {
        name: TrainConfig.model_validate({**section, "schedule": name}) for name in ("constant", "linear", "cosine")
    }
    for config in by_name.values():
        assert [learning_rate(config, step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert [learning_rate(c, 60) for c in by_name.values()] == pytest.approx([2.0, 1.1, 1.1])
    assert [learning_rate(c, 110) for c in by_name.values()] == pytest.approx([2.0, 0.2, 0.2])


def test_a_schedule_that_ends_later_is_reported_with_both_rates_and_the_fix(recipe, tmp_path: Path) -> None:
    fit(recipe(steps=8))
    fit(recipe(steps=12))
    (line,) = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "WARNING" in line]
    assert "train.steps was 8 and is 12: on schedule cosine" in line
    assert "step 9 would have been 0 and is 0.005." in line
    assert "Fix: set train.schedule: {before: cosine, restart: 8, then: cosine}" in line
    restarted = recipe(steps=16, schedule={"before": "cosine", "restart": 12, "then": "constant"})
    assert fit(restarted)["steps"] == 16  # the same run, and nothing to warn of
    assert (tmp_path / "run" / "train.log").read_text().count("WARNING") == 1
    rates = [record["lr"] for record in records(tmp_path / "run")]
    assert rates[12:] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    with pytest.raises(RecipeError, match=r"different: schedule"):
        fit(recipe(steps=20, schedule={"before": "linear", "restart": 12}))


def test_a_schedule_restarts_where_it_ended() -> None:
    section = {"model": "x:X", "run": "r", "steps": 200, "warmup": 10, "lr": 2.0, "final_lr": 0.1}
    once = TrainConfig.model_validate({**section, "steps": 100, "schedule": "cosine"})
    twice = TrainConfig.model_validate({**section, "schedule": {"restart": 100}})
    assert [learning_rate(twice, step) for step in range(100)] == [learning_rate(once, step) for step in range(100)]
    assert [learning_rate(twice, step) for step in (100, 109, 110)] == pytest.approx([0.38, 2.0, 2.0])
    assert learning_rate(twice, 200) == pytest.approx(0.2)
    assert once.identity() == twice.identity()


def spoil(dataset: Path, shard: str, row: int) -> str:
    """Zero the second half of an image in a tar, as a disk may; return its key."""
    table = pq.read_table(dataset / "shards" / f"{shard}.parquet")
    key, offset, size = (table[name][row].as_py() for name in ("key", "offset", "size"))
    with (dataset / "shards" / f"{shard}.tar").open("r+b") as file:
        file.seek(offset + 2)
        file.write(bytes(size - 2))
    return key


def test_a_spoilt_sample_is_named_or_skipped_and_the_run_is_the_same_else(make_dataset, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "ds", [20, 12])
    key = spoil(dataset, "shard-000001", 3)
    with pytest.raises(CapstanError, match=rf"sample {key} \(.*shard-000001\.tar, row 3\).*Fix: .*bad: {{skip: 100}}"):
        fit(make_recipe(dataset, tmp_path / "run"))
    data = {"layer": None, "bad": {"skip": 1}}
    assert fit(make_recipe(dataset, tmp_path / "run", data=data))["steps"] == 12  # the same run
    assert f"skipping sample {key}" in (tmp_path / "run" / "train.log").read_text()
    last = records(tmp_path / "run")[-1]
    assert (last["skipped"], last["step"]) == (1, 12)
    fit(make_recipe(dataset, tmp_path / "again", data=data, steps=7, schedule="constant"))
    fit(make_recipe(dataset, tmp_path / "whole", data=data, schedule="constant"))
    fit(make_recipe(dataset, tmp_path / "again", data=data, schedule="constant"))
    assert_same(tmp_path / "again", tmp_path / "whole")


def test_without_its_packages_the_trainer_names_the_extra() -> None:
    hidden = "import runpy, sys; sys.modules['torch'] = None; "  # find_spec and import see no torch
    code = f"{hidden}runpy.run_module('capstan.training.trainer', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "recipe.yaml"], capture_output=True, text=True, timeout=300)
    named = "capstan.training.trainer: needs the package torch. Fix: pip install 'capstan-t2i[train]'"
    assert (done.returncode, done.stderr) == (2, f"error: {named}\n")
