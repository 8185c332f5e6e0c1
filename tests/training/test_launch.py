"""Workers under every launcher: told to stop, killed, fewer or more, a run ends as one that nothing happened to."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm_python
import yaml
from repo import HELPERS, ROOT
from tiny_runs import assert_same, make_recipe, records, wait_for_step, weights

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.ports import free_port
from capstan.training.config.machine import placement
from capstan.training.launch import train
from capstan.training.trainer import fit


@pytest.fixture(autouse=True, scope="module")
def _importable() -> Iterator[None]:
    """Workers find the tiny family as this process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HELPERS))
        yield


@pytest.fixture
def _cold_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start workers as users do; in other tests of training they are forks."""
    monkeypatch.setattr("capstan.training.launch.subprocess", subprocess)


@pytest.fixture
def recipe(squares: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe(name, key=value, ...)` trains the tiny family in the folder `name`."""
    return lambda run="run", **section: make_recipe(squares, tmp_path / run, **section)


DEEPSPEED = {"strategy": "deepspeed", "zero": 2, "workers": 2}


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--rdzv_backend=c10d"]
ACCELERATE += ["--main_process_ip=localhost", f"--main_process_port={free_port()}"]  # not the one that all others use


def launch(launcher: list[str], recipe: Recipe, tmp_path: Path) -> subprocess.Popen:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "-m", "capstan.training.trainer", str(path)]
    return subprocess.Popen(command, env=environment)


@pytest.fixture(scope="module")
def whole(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with ZeRO 2 that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capstan.training.launch.subprocess", warm_python)
        train(make_recipe(squares, run, engine={**DEEPSPEED, "launcher": "local"}))
    return run


@pytest.mark.integration
@pytest.mark.slow
def test_torchrun_is_told_to_stop_and_accelerate_goes_on(recipe, whole: Path, tmp_path: Path) -> None:
    assert "DeepSpeed, ZeRO stage 2, world size 2" in (whole / "train.log").read_text()
    run, slow = tmp_path / "run", recipe(engine=DEEPSPEED, tiny={"sleep_s": 0.2})
    first = launch(TORCHRUN, slow, tmp_path)
    wait_for_step(run, 6)
    first.terminate()  # as a scheduler does that takes the machine back
    assert first.wait(300) != 0
    (stopped,) = re.findall(r"stopped after step (\d+)", (run / "train.log").read_text())
    assert (run / "checkpoints" / f"step-{int(stopped):06d}" / "checkpoint.json").exists()
    assert launch(ACCELERATE, slow, tmp_path).wait(450) == 0
    words = (run / "train.log").read_text()
    assert words.count("DeepSpeed, ZeRO stage 2, world size 2") == 2
    assert "resuming from" in words
    assert_same(run, whole)


@pytest.mark.usefixtures("_cold_workers")
@pytest.mark.integration
def test_workers_that_are_killed_are_started_again(
    recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, orders = tmp_path / "run", tmp_path / "orders"
    orders.mkdir()
    for order in ("3-1", "9-0"):  # before the first checkpoint, and after the second
        (orders / order).touch()
    monkeypatch.setenv("TINY_KILL", str(orders))
    train(recipe(engine={**DEEPSPEED, "launcher": "local"}))
    assert (run / "train.log").read_text().count("world size 2") == 3
    assert not list(orders.iterdir())
    assert_same(run, whole)


@pytest.mark.integration
def test_runs_that_come_before_are_trained_first_and_once(recipe, tmp_path: Path) -> None:
    local = {"strategy": "ddp", "launcher": "local"}
    first = recipe("first", engine=local, steps=3).train
    last = recipe("last", engine=local, steps=2, init=str(tmp_path / "first"), before=[first])
    wrong = {**last.train, "before": [{**first, "batch": 0}]}
    with pytest.raises(RecipeError, match=r"^train\.before\.0\.batch: "):  # before anything is trained
        train(last.model_copy(update={"train": wrong}))
    assert not (tmp_path / "first" / "log.jsonl").exists()
    assert train(last)["run"] == str(tmp_path / "last")
    ends = [json.loads((tmp_path / run / "finished.json").read_text())["steps"] for run in ("first", "last")]
    assert ends == [3, 2]
    written = (tmp_path / "first" / "finished.json").stat().st_mtime_ns
    (tmp_path / "last" / "finished.json").unlink()
    assert train(last)["steps"] == 2
    assert (tmp_path / "first" / "finished.json").stat().st_mtime_ns == written


def epochs_seen(record: Path, batch: int, an_epoch: int) -> list[Counter[str]]:
    """The samples of each epoch, out of what the tiny family's workers have recorded in `record`/RUN/."""
    steps: list[list[str]] = []
    for run in sorted(record.iterdir()):
        workers = [file.read_text().splitlines() for file in sorted(run.iterdir())]
        steps += [" ".join(shares).split() for shares in zip(*workers, strict=True)]
    assert {len(step) for step in steps} == {batch}
    seen = [number for step in steps for number in step]
    return [Counter(seen[start : start + an_epoch]) for start in range(0, len(seen), an_epoch)]


def train_in_turns(
    recipe, record: Path, turns: list[tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train to each of these steps with this engine, and keep what each turn has seen."""
    for number, (steps, engine) in enumerate(turns):
        (record / str(number)).mkdir(parents=True)
        monkeypatch.setenv("TINY_RECORD", str(record / str(number)))
        wanted = recipe(steps=steps, engine=engine, schedule="constant", log_every=5, checkpoint={"every": 7})
        assert (train if "launcher" in engine else fit)(wanted)["steps"] == steps


@pytest.mark.integration
def test_other_workers_and_strategies_go_on_with_the_same_samples(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, two = {"strategy": "ddp"}, {**DEEPSPEED, "launcher": "local"}
    train_in_turns(recipe, tmp_path / "record", [(6, alone), (13, two), (16, alone)], monkeypatch)
    everything = Counter(str(number) for number in range(64))
    assert epochs_seen(tmp_path / "record", 8, 64) == [everything, everything]
    seen = records(tmp_path / "run")
    assert [record["step"] for record in seen] == [5, 6, 10, 13, 15, 16]
    assert seen[-2]["loss"] < seen[0]["loss"]
    words = (tmp_path / "run" / "train.log").read_text()
    assert "written by 1 worker of DDP, with 2 workers of ZeRO 2" in words
    assert "written by 2 workers of ZeRO 2, with 1 worker of DDP" in words


@pytest.fixture
def _ray() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


@pytest.mark.integration
@pytest.mark.usefixtures("_ray")
@pytest.mark.slow
def test_ray_train_starts_dead_workers_again(recipe, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def end_a_worker() -> None:
        wait_for_step(run, 6, limit_s=500)
        ours = psutil.Process().children(recursive=True)
        workers = [process for process in ours if "RayTrainWorker" in " ".join(process.cmdline())]
        workers[-1].terminate()

    killer = threading.Thread(target=end_a_worker, daemon=True)
    killer.start()
    elastic = {**DEEPSPEED, "workers": [1, 3], "launcher": "ray"}  # a batch of 8 cannot be dealt among 3
    slow = recipe(engine=elastic, tiny={"sleep_s": 0.2})
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
        "import sys; from pathlib import Path; from capstan.pipeline.config import Recipe\n"
        "from capstan.training.launch import train\n"
        "try: train(Recipe.model_validate_json(Path(sys.argv[1]).read_text()))\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "recipe.json")], env=environment)
    wait_for_step(run, 5)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    saved = max((run / "checkpoints").glob("step-*/checkpoint.json"))
    assert json.loads(saved.read_text())["step"] >= 5
    assert not (run / "stop").exists()


def test_as_many_workers_as_there_is_room_for() -> None:
    gpu = {"CPU": 1, "GPU": 1}
    assert placement([4, 2, 1], 3, [16], None) == (2, gpu)
    assert placement([4, 2, 1], 0, [2], None) == (2, {"CPU": 1})
    assert placement([4, 2], 0, [4, 2], 3) is None
    assert placement([4, 2], 0, [4, 4], 3) == (2, {"CPU": 3})
    assert placement([4], 2, [64], None) is None  # CPUs do not stand in for GPUs that are too few


def test_errors_of_workers_are_raised_as_they_are(recipe) -> None:
    with pytest.raises(CapstanError, match="not finite"):
        train(recipe(tiny={"explode_at": 5}, engine={"launcher": "local"}))


# Minutes -------------------------------------------------------------------------------------------------------------


def kill_workers(run: Path, steps: list[int], victims: random.Random) -> None:
    """SIGKILL one of the workers of this process's run soon after each of these steps is logged, once a start."""
    for starts, step in enumerate(steps, 1):
        wait_for_step(run, step)
        while (run / "train.log").read_text().count("engine: ") < starts:
            time.sleep(0.02)
        found = [p for p in psutil.Process().children() if "training.launch" in " ".join(p.cmdline())]
        victims.choice(found).kill()


@pytest.mark.usefixtures("_cold_workers")
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_change_nothing(recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = {"steps": 200, "checkpoint": {"every": 5}, "tiny": {"sleep_s": 0.05}}
    engine = {**DEEPSPEED, "launcher": "local", "retries": 20}
    train(recipe("whole", engine=engine, **section))
    run, chance = tmp_path / "run", random.Random(20)
    steps = sorted(chance.sample(range(3, 198), 20))
    killer = threading.Thread(target=kill_workers, args=(run, steps, chance), daemon=True)
    killer.start()
    started = time.monotonic()
    train(recipe(engine=engine, **section))
    killer.join(1)
    assert not killer.is_alive()
    words = (run / "train.log").read_text()
    assert words.count("world size 2") == 21
    assert_same(run, tmp_path / "whole")
    resumed = [int(step) for step in re.findall(r"resuming from .*step-(\d+)", words)]
    with capsys.disabled():
        print(f"\n20 SIGKILLs at steps {steps}; gone on from {resumed}; {time.monotonic() - started:.0f} s")
        print(f"200 losses and all weights are those of the run that nothing happened to: {weights(run).keys()}")


@pytest.mark.usefixtures("_cold_workers")
@pytest.mark.slow
def test_two_then_one_then_two_workers_see_every_sample_once_an_epoch(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two, one = ({**DEEPSPEED, "workers": workers, "launcher": "local"} for workers in (2, 1))
    train_in_turns(recipe, tmp_path / "record", [(10, two), (21, one), (32, two)], monkeypatch)
    everything = Counter(str(number) for number in range(64))
    epochs = epochs_seen(tmp_path / "record", 8, 64)
    assert epochs == [everything] * 4
    with capsys.disabled():
        print(
            f"\n2 → 1 → 2 workers of ZeRO 2, turns at steps 10 and 21: {len(epochs)} epochs, each sample once in each"
        )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_a_scheduler_takes_the_machine_back(recipe, tmp_path: Path, launcher: str) -> None:
    run = tmp_path / "run"
    slow = recipe(engine={**DEEPSPEED, "launcher": launcher}, steps=10_000, tiny={"sleep_s": 0.05})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(slow.model_dump(mode="json")))
    command = [
        sys.executable,
        "-m",
        "capstan",
        "train",
        str(tmp_path / "recipe.yaml"),
        "--set",
        "resources.cpus=2",
    ]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])})
    wait_for_step(run, 5)
    process.terminate()
    assert process.wait(300) == 130
    (stopped,) = re.findall(r"stopped after step (\d+)", (run / "train.log").read_text())
    assert (run / "checkpoints" / f"step-{int(stopped):06d}" / "checkpoint.json").exists()


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_ray_goes_on_with_the_workers_that_there_are(recipe, tmp_path: Path) -> None:
    from capstan.cluster.local_cluster import Nodes

    section = {"schedule": "constant", "steps": 30, "data": {"layer": None, "threads": 1}}
    fit(recipe("whole", **section))
    elastic = {**DEEPSPEED, "zero": 1, "workers": [1, 2], "launcher": "ray", "retries": 4}
    slow = recipe(engine=elastic, tiny={"sleep_s": 0.3}, **section)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(slow.model_dump(mode="json")))
    command = [
        sys.executable,
        "-m",
        "capstan",
        "train",
        str(tmp_path / "recipe.yaml"),
        "--set",
        "resources.gpus=0",
    ]
    soon = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
    env = os.environ | soon | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    run = tmp_path / "run"
    with Nodes(tmp_path / "ray") as nodes:
        nodes.start_head(env=env)
        _, lost = (nodes.start_worker(cpus=1, env=env) for _ in range(2))
        driver = env | nodes.driver_env()
        first = subprocess.Popen([*command, "--set", "train.steps=20"], env=driver)
        wait_for_step(run, 8)
        nodes.kill(lost)
        assert first.wait(400) == 0
        nodes.start_worker(cpus=1, env=env)
        assert subprocess.run(command, env=driver, check=False).returncode == 0
    worlds = re.findall(r"world size (\d)", (run / "train.log").read_text())
    assert (worlds[0], worlds[-1]) == ("2", "2")
    assert "1" in worlds
    ours, theirs = ([record["seen"] for record in records(folder)] for folder in (run, tmp_path / "whole"))
    assert ours == pytest.approx(
        theirs, rel=1e-6
    )  # the same samples in the same steps: sums of keys' 32 bits, in floats
