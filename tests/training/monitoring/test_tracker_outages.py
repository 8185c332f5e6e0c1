"""Outages of a tracker's server, at the start, in the middle and at the end: training continues, gaps are filled."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from pathlib import Path

import pytest
from mlflow_server import Server
from tiny_runs import make_recipe

from capstan.training.config import TrainConfig
from capstan.training.launch import train
from capstan.training.monitoring.trackers import delivery, open_trackers, tensorboard
from capstan.training.monitoring.trackers.subject import Subject
from capstan.training.run import Run
from capstan.training.trainer import fit


@pytest.fixture
def server(tmp_path: Path, monkeypatch) -> Server:
    server = Server(tmp_path / "artifacts")
    with server.up():  # for a port of its own
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.port}")
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 0.1)
    return server


@pytest.fixture
def run(tmp_path: Path) -> Run:
    tmp_path.joinpath("run").mkdir()
    section = {"model": "captioner", "run": str(tmp_path / "run"), "steps": 9, "watch": {"trackers": ["mlflow"]}}
    return Run(TrainConfig.from_section(section))


def wait_for(condition, limit_s: float = 300) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_gap_at_the_start_and_in_the_middle_is_filled_in_order(server: Server, run: Run, caplog) -> None:
    caplog.set_level(logging.INFO)
    trackers = open_trackers(run, 0)  # nobody listens yet
    for step in (1, 2):
        trackers.scalars(step, {"loss": 1 / step})
    pending = run.folder / "mlflow-pending.jsonl"
    assert [json.loads(line)["step"] for line in pending.read_text().splitlines()] == [1, 2]
    wait_for(lambda: "tracker mlflow: unavailable (" in caplog.text)
    with server.up():
        wait_for(lambda: len(server.losses()) == 2)
        wait_for(lambda: not pending.exists())
    trackers.scalars(3, {"loss": 1 / 3})
    wait_for(lambda: caplog.text.count("unavailable") == 2)  # one warning an outage
    with server.up():
        trackers.scalars(4, {"loss": 1 / 4})
        trackers.close()
        trackers.close()  # a second time changes nothing
    assert server.losses() == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert server.ended
    assert caplog.text.count("available again") == 2
    assert caplog.text.count("unavailable") == 2


def test_an_outage_at_the_end_is_made_up_for_by_the_next_start(server: Server, run: Run, caplog) -> None:
    with server.up():
        trackers = open_trackers(run, 0)
        trackers.scalars(1, {"loss": 1.0})
        wait_for(lambda: server.losses() == [(1, 1.0)])
    for step in (2, 3, 4):
        trackers.scalars(step, {"loss": 1 / step})
    started = time.monotonic()
    trackers.close()
    assert time.monotonic() - started < 30
    assert "3 records were not sent" in caplog.text
    with server.up():
        trackers = open_trackers(run, 3)  # from a checkpoint: step 4 is logged again
        trackers.scalars(4, {"loss": 0.5})
        trackers.close()
    assert server.losses() == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 0.5)]
    assert not (run.folder / "mlflow-pending.jsonl").exists()


def test_a_record_that_is_rejected_does_not_hold_up_the_others(server: Server, run: Run, caplog) -> None:
    server.rejected = {2}
    with server.up():
        trackers = open_trackers(run, 0)
        for step in (1, 2, 3):
            trackers.scalars(step, {"loss": float(step)})
        trackers.close()
    assert server.losses() == [(1, 1.0), (3, 3.0)]
    assert "tracker mlflow rejects a record of step 2" in caplog.text


def test_a_whole_run_without_its_server_is_sent_when_it_is_back(server: Server, squares: Path, tmp_path: Path) -> None:
    recipe = make_recipe(squares, tmp_path / "run", steps=4, watch={"trackers": ["mlflow"]})
    assert fit(recipe)["steps"] == 4
    assert server.losses() == []
    with server.up():
        assert train(recipe)["steps"] == 4  # which is finished already
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert server.losses() == [(record["step"], record["loss"]) for record in logged]
    assert server.ended


def test_an_error_of_tensorboards_own_thread_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised by the next call, which the run logs; the thread would print it as a traceback as well."""
    printed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    tensorboard._print_no_error_twice.cache_clear()
    tracker = tensorboard.Tracker(Subject(tmp_path, dict, "run"), 0)
    shutil.rmtree(tmp_path / "tensorboard")

    def write_on() -> None:
        for step in range(1000):
            tracker.scalars(step, {"loss": 1.0}, 0.0)
            tracker.writer.flush()

    with pytest.raises(FileNotFoundError):
        write_on()
    assert not printed

    broken = threading.Thread(target=int, args=("x",))
    broken.start()
    broken.join()
    assert [raised.thread for raised in printed] == [broken]  # of others it is printed as ever
    tensorboard._print_no_error_twice.cache_clear()
