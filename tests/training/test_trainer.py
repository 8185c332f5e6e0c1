"""Runs from a recipe to a product: stopped, killed and gone on with, they end as uninterrupted ones do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from pipeline.config import Recipe
from pipeline.errors import CapstanError, RecipeError
from training.config import TrainConfig
from training.launch import train
from training.trainer import fit, learning_rate

HERE = Path(__file__).parent


@pytest.fixture(autouse=True, scope="module")
def _importable() -> Iterator[None]:
    """Workers find the tiny family as this process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield


def make_recipe(dataset: Path, run: Path, **section: Any) -> Recipe:
    base = {"model": "tiny_family:TinyFamily", "run": str(run), "steps": 12, "batch": 8, "log_every": 1}
    base |= {"lr": 0.01, "warmup": 4, "schedule": "cosine", "ema": 0.9, "data": {"layer": None}}
    base |= {"checkpoint": {"every": 4}, "engine": {"strategy": "ddp"}}
    return Recipe(dataset=str(dataset), train={**base, **section})


@pytest.fixture
def recipe(squares: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe(name, key=value, ...)` trains the tiny family in the folder `name`."""
    return lambda run="run", **section: make_recipe(squares, tmp_path / run, **section)


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
    timed = ("images_per_s", "data_wait", "flops_per_s", "host_memory_gib")
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "product" / "weights.pt")


def assert_same(run: Path, other: Path) -> None:
    """Every record and every weight, bit for bit."""
    assert records(run) == records(other)
    ours, theirs = weights(run), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# One process ---------------------------------------------------------------------------------------------------------


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
    with pytest.raises(RecipeError, match=r"train\.run: .*other: lr"):
        fit(recipe(steps=2, lr=0.5))
    with pytest.raises(RecipeError, match=r"engine\.strategy|train\.engine"):
        train(recipe(steps=4, engine={"strategy": "deepspeed", "launcher": "local"}))


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


def test_learning_rate_rises_and_falls() -> None:
    section = {"model": "x:X", "run": "r", "steps": 110, "warmup": 10, "lr": 2.0, "final_lr": 0.1}
    by_name = {
        name: TrainConfig.model_validate({**section, "schedule": name}) for name in ("constant", "linear", "cosine")
    }
    for config in by_name.values():
        assert [learning_rate(config, step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert [learning_rate(c, 60) for c in by_name.values()] == pytest.approx([2.0, 1.1, 1.1])
    assert [learning_rate(c, 110) for c in by_name.values()] == pytest.approx([2.0, 0.2, 0.2])


# Many processes ------------------------------------------------------------------------------------------------------

DEEPSPEED = {"strategy": "deepspeed", "zero": 2, "workers": 2}


def wait_for_step(run: Path, step: int, limit_s: float = 200) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if (seen := records(run)) and seen[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} did not come to step {step}")


def accelerate_launch(recipe: Recipe, tmp_path: Path) -> subprocess.Popen:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--rdzv_backend=c10d"]
    command += ["--main_process_ip=localhost", "--main_process_port=0", "-m", "training.trainer"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(path)], env=environment)


@pytest.fixture(scope="module")
def whole(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with ZeRO 2 that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(make_recipe(squares, run, engine={**DEEPSPEED, "launcher": "local"}))
    return run


@pytest.mark.integration
def test_two_processes_killed_and_gone_on_with(recipe, whole: Path, tmp_path: Path) -> None:
    assert "DeepSpeed, ZeRO stage 2, world size 2" in (whole / "train.log").read_text()
    run, slow = tmp_path / "run", recipe(engine=DEEPSPEED, tiny={"sleep_s": 0.2})
    first = accelerate_launch(slow, tmp_path)
    try:
        wait_for_step(run, 6)
    finally:
        for process in [*psutil.Process(first.pid).children(recursive=True), first]:
            process.kill()
        first.wait()
    assert accelerate_launch(slow, tmp_path).wait(200) == 0
    words = (run / "train.log").read_text()
    assert words.count("DeepSpeed, ZeRO stage 2, world size 2") == 2
    assert "going on from" in words
    assert_same(run, whole)


@pytest.fixture
def _ray() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


@pytest.mark.integration
@pytest.mark.usefixtures("_ray")
def test_ray_train_starts_dead_workers_again(recipe, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def kill_a_worker() -> None:
        wait_for_step(run, 6)
        ours = psutil.Process().children(recursive=True)
        workers = [process for process in ours if "RayTrainWorker" in " ".join(process.cmdline())]
        workers[-1].kill()

    killer = threading.Thread(target=kill_a_worker, daemon=True)
    killer.start()
    slow = recipe(engine={**DEEPSPEED, "launcher": "ray"}, tiny={"sleep_s": 0.2})
    summary = train(slow.model_copy(update={"resources": slow.resources.model_copy(update={"cpus": 2})}))
    killer.join()
    assert summary["steps"] == 12
    assert (run / "train.log").read_text().count("DeepSpeed, ZeRO stage 2, world size 2") == 2
    assert_same(run, whole)


@pytest.mark.integration
def test_an_interrupt_saves_ends_soon_and_leaves_no_worker(recipe, tmp_path: Path) -> None:
    run, slow = tmp_path / "run", recipe(engine={"launcher": "local"}, steps=10_000, tiny={"sleep_s": 0.05})
    (tmp_path / "recipe.json").write_text(slow.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from pipeline.config import Recipe; from training.launch import train\n"
        "try: train(Recipe.model_validate_json(Path(sys.argv[1]).read_text()))\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "recipe.json")], env=environment)
    wait_for_step(run, 5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    saved = max((run / "checkpoints").glob("step-*/checkpoint.json"))
    assert json.loads(saved.read_text())["step"] >= 5
    assert not (run / "stop").exists()


def test_errors_of_workers_are_raised_as_they_are(recipe) -> None:
    with pytest.raises(CapstanError, match="not finite"):
        train(recipe(tiny={"explode_at": 5}, engine={"launcher": "local"}))
