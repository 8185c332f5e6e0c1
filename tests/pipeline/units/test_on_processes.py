"""Worker processes: which runs they take, and how they end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cloudpickle
import pytest

from capstan.pipeline import units
from capstan.pipeline.config import Resources
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import SMALL_RUN, Job, Piece, Unit

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules

# Two workers write their process ids, then wait.
WAITING = """
import os, sys, time
from pathlib import Path
from capstan.pipeline.config import Resources
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Unit, run

class Waiting(Job):
    name = "waiting"
    def __init__(self, storage, folder):
        self.storage, self.folder = storage, folder
    def prepare(self, unit):
        Path(self.folder, unit.id).write_text(str(os.getpid()))
        time.sleep(600)
        yield {}
    def commit(self, unit, pieces):
        return {}

job = Waiting(Storage(sys.argv[1] + "/dataset"), sys.argv[1])
try:
    run(job, [Unit("a"), Unit("b"), Unit("c")], Resources(cpus=2), progress=False)
except KeyboardInterrupt:
    Path(sys.argv[1], "interrupted").touch()
    time.sleep(600)
"""


class Plain(Job):
    name = "plain"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        seen = {name: os.environ.get(name, "") for name in ("CAPSTAN_TEST", "OMP_WAIT_POLICY")}
        yield {"process": os.getpid(), "environment": seen["CAPSTAN_TEST"], "threads": seen["OMP_WAIT_POLICY"]}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Piece]:
        return dict(pieces[0])


class WithModel(Plain):
    def model(self) -> Callable[[Piece], Piece]:
        return lambda piece: piece


class Unloadable(Plain):
    def __reduce__(self) -> tuple[object, ...]:
        return int, ("not a number",)


def few(count: int = 1) -> list[Unit]:
    return [Unit(str(number)) for number in range(count)]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had no Ray and the machine no GPU."""
    monkeypatch.setattr(units, "ray_runs_here", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(units, "has_gpu", lambda: False)


def test_small_runs_need_no_ray(alone: None, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model, resources = Plain(storage), WithModel(storage), Resources()
    assert not units._on_ray(plain, few(SMALL_RUN), resources)
    assert units._on_ray(plain, few(SMALL_RUN + 1), resources)
    assert not units._on_ray(model, few(), resources)
    assert units._on_ray(plain, few(), Resources(metrics_port=9400))
    assert not units._on_ray(plain, few(), Resources(gpus=1))
    assert units._on_ray(model, few(), Resources(gpus=1))
    monkeypatch.setattr(units, "has_gpu", lambda: True)
    assert units._on_ray(model, few(), resources)
    assert not units._on_ray(model, few(), Resources(gpus=0))


def test_a_cluster_takes_every_run(alone: None, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert units._on_ray(Plain(storage), few(), Resources())


def test_a_process_with_ray_uses_it(alone: None, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "ray_runs_here", lambda: True)
    assert units._on_ray(Plain(storage), few(), Resources())


@pytest.mark.parametrize(("executor", "on_ray"), [("processes", False), ("ray", True)])
def test_the_recipe_may_choose(alone: None, storage: Storage, executor: str, on_ray: bool) -> None:
    for count in (1, SMALL_RUN + 1):
        resources = Resources.model_validate({"executor": executor, "metrics_port": 9400})
        assert units._on_ray(WithModel(storage), few(count), resources) is on_ray


def run(job: Job) -> units.Summary:
    return units.run(job, few(), Resources(cpus=1, executor="processes"), progress=False)


def test_workers_are_kept_for_the_next_run_with_the_drivers_environment(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(Plain(storage)).done == 1
    first = Plain(storage).markers.read()["0"]
    monkeypatch.setenv("CAPSTAN_TEST", "changed")
    other = Plain(Storage(f"{storage.url}-2"))
    assert run(other).done == 1
    second = other.markers.read()["0"]
    assert (first["environment"], second["environment"]) == ("", "changed")
    assert first["process"] == second["process"]


def test_threads_without_work_sleep_unless_the_driver_says_otherwise(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert run(Plain(storage)).done == 1
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    other = Plain(Storage(f"{storage.url}-2"))
    assert run(other).done == 1
    assert [job.markers.read()["0"]["threads"] for job in (Plain(storage), other)] == ["PASSIVE", "ACTIVE"]


def test_a_job_that_cannot_be_loaded_gives_its_reason(storage: Storage) -> None:
    summary = run(Unloadable(storage))
    assert list(summary.quarantined) == ["0"]
    assert "invalid literal for int" in summary.quarantined["0"]


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A driver and its two workers, which are at work."""
    with subprocess.Popen([sys.executable, "-c", WAITING, str(tmp_path)]) as driver:
        files = [tmp_path / "a", tmp_path / "b"]
        until(lambda: all(file.exists() and file.read_text() for file in files))
        yield driver, [int(file.read_text()) for file in files]
        driver.kill()


@pytest.mark.integration
def test_nothing_outlives_a_killed_driver(waiting: tuple[subprocess.Popen[bytes], list[int]]) -> None:
    driver, workers = waiting
    driver.kill()
    until(lambda: not any(map(is_running, workers)))


@pytest.mark.integration
def test_an_interrupt_ends_the_workers(waiting: tuple[subprocess.Popen[bytes], list[int]], tmp_path: Path) -> None:
    driver, workers = waiting
    driver.send_signal(signal.SIGINT)
    until(lambda: (tmp_path / "interrupted").exists())
    until(lambda: not any(map(is_running, workers)))
    assert driver.poll() is None
    assert not (tmp_path / "c").exists()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300  # a bound for hangs
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
