"""Time from a run's log, and steps for a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capstan.training.lecture.clock import Spent, spent, train_for


def test_time_is_that_of_the_steps(tmp_path: Path) -> None:
    assert spent(tmp_path, 8) == Spent()
    rows = [{"step": 5, "samples_per_s": 4.0, "cpu_s": 3.0}, {"step": 10, "samples_per_s": 8.0, "cpu_s": 4.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert spent(tmp_path, 8) == Spent(10, 5 * 8 / 4 + 5 * 8 / 8, 7.0)


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_a_run_is_trained_for_its_time_in_few_pieces(clock: str) -> None:
    pieces = [0]

    def measured() -> Spent:
        return Spent(pieces[-1], 0.5 * pieces[-1], 0.25 * pieces[-1])

    used = train_for(60, clock, measured, pieces.append)  # type: ignore[arg-type]
    assert used.seconds(clock) == pytest.approx(60, rel=0.05)  # type: ignore[arg-type]
    assert pieces == sorted(set(pieces))
    assert len(pieces) <= 4
    before = len(pieces)
    train_for(60, clock, measured, pieces.append)  # type: ignore[arg-type]
    assert len(pieces) == before  # nothing is left to do


def test_an_unsteady_run_ends() -> None:
    pieces: list[int] = []
    used = train_for(1e6, "cpu", lambda: Spent(len(pieces), 1.0, len(pieces)), pieces.append)
    assert used.cpu_s < 1e6
    assert len(pieces) == 6
