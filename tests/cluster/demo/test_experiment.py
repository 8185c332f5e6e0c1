"""`capstan experiment world`: every real part in small, interrupted and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capstan.training.config import TrainConfig
from capstan.training.run import differences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "capstan", "experiment", "world", str(folder), "--quick", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def stop_once(process: subprocess.Popen[str], there: Path, how: signal.Signals) -> None:
    """Send a signal as soon as a file is there."""
    until = time.monotonic() + 900
    while not there.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"{there} did not come"
        time.sleep(0.05)
    os.kill(process.pid, how)
    process.communicate(timeout=180)


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("experiment") / "world"
    runs = folder / "experiment"
    stop_once(start(folder), runs / "arms" / "original-s0" / "log.jsonl", signal.SIGKILL)
    process = start(folder)
    stop_once(process, runs / "measured" / "short95-s0" / "step-000002.json", signal.SIGINT)
    assert process.returncode == 130
    process = start(folder)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return folder, json.loads(out.splitlines()[-1])


def test_every_arm_has_been_trained_and_measured_on_every_set(summary: tuple[Path, dict]) -> None:
    folder, result = summary
    assert result["runs"] == {"original": 2, "short95": 2, "descriptive95": 2, "truth95": 2}
    assert not any("truth95," in text for text in result["found"] if text.startswith("Not run here"))
    assert any("paper's order" in text for text in result["found"])
    results = json.loads((folder / "experiment" / "results.json").read_text())
    assert set(results["table"]) == {"original", "descriptive", "upsampled"}
    assert {"followed", "clip_mean"} <= set(results["table"]["descriptive"])
    assert results["blends"]["original"]["drawn"] == {"original": 1.0}


def test_no_step_was_lost_or_repeated(summary: tuple[Path, dict]) -> None:
    folder, _ = summary
    for run in sorted((folder / "experiment" / "arms").iterdir()):
        steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4], run.name


def test_runs_differ_by_their_captions_alone(summary: tuple[Path, dict]) -> None:
    folder, _ = summary
    arms = folder / "experiment" / "arms"
    first, other = (
        TrainConfig.from_section(json.loads((arms / name / "recipe.json").read_text())["recipe"]["train"]).identity()
        for name in ("original-s0", "descriptive95-s0")
    )
    assert set(differences(first, other)) == {"data.blend.descriptive", "data.blend.original"}
    vocabularies = {(arm / "product" / "tokenizer" / "tokenizer.json").read_bytes() for arm in arms.glob("*-s0")}
    assert len(vocabularies) == 1


def test_the_scorer_is_no_part_of_the_training(summary: tuple[Path, dict]) -> None:
    folder, _ = summary
    recipe = json.loads((folder / "scorer" / "recipe.json").read_text())["recipe"]
    assert recipe["train"]["captioner"]["caption"] == 0
    assert "init" not in recipe["train"]
