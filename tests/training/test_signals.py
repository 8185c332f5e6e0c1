"""Ctrl-C and SIGTERM: the first lets a run save, however long it takes; what asks again ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from capstan.training import launch, signals
from capstan.training.config import TrainConfig
from capstan.training.run import Run
from capstan.training.signals import Interrupts


def _end(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _as_on_the_command_line() -> Iterator[None]:
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_signal_that_is_handed_on_twice_is_one_request(clock: SimpleNamespace) -> None:
    with Interrupts("stopping") as heard:
        assert not heard.seen
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            clock.now += 1.0
        assert heard.seen
        clock.now += 10.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is _end


def test_a_second_ctrl_c_ends_at_once() -> None:
    with Interrupts("stopping") as heard:
        signal.raise_signal(signal.SIGINT)
        assert heard.seen
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts("stopping") as heard:
        signal.raise_signal(signal.SIGINT)
        assert not heard.seen


class Hasty(threading.Event):
    """Hours are hundredths of a second."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(0.01)


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`waiting(work, *signals)` waits for `work` as the launcher does, and gets these signals: (result, was killed)."""
    monkeypatch.setattr(launch, "threading", SimpleNamespace(Thread=threading.Thread, Event=Hasty))
    run = Run(TrainConfig.model_validate({"model": "x:X", "run": str(tmp_path / "run"), "steps": 1}))
    run.folder.mkdir()

    def wait(work: Callable[[Run], dict[str, Any]], *signals: int) -> tuple[Any, bool]:
        killed: list[bool] = []

        def signalled() -> dict[str, Any]:
            for number in signals:
                signal.pthread_kill(threading.main_thread().ident, number)
                time.sleep(0.1)
            return work(run)

        try:
            return launch._wait_for(signalled, run, lambda: killed.append(True)), bool(killed)
        except KeyboardInterrupt:
            return None, bool(killed)
        finally:
            assert not run.stop.exists()  # else the next start would stop after one step

    return wait


def test_workers_are_given_the_time_that_saving_takes(waiting) -> None:
    def save(run: Run) -> dict[str, Any]:
        while not run.stop.exists():
            time.sleep(0.01)
        time.sleep(0.3)  # thirty times as long as any patience
        run.stop.unlink()
        return {"stopped": True}

    assert waiting(save, signal.SIGTERM, signal.SIGTERM) == ({"stopped": True}, False)


def test_who_asks_again_has_the_workers_killed(waiting) -> None:
    assert waiting(lambda run: time.sleep(1.0) or {}, signal.SIGINT, signal.SIGINT) == (None, True)


def test_workers_that_cannot_save_are_told_of(waiting, caplog: pytest.LogCaptureFixture) -> None:
    def fail(run: Run) -> dict[str, Any]:
        raise OSError("no space left")

    assert waiting(fail, signal.SIGTERM) == (None, False)
    assert "not saved (no space left)" in caplog.text
