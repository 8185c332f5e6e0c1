"""Run folders, read while they grow and however they were damaged."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import add_grid, add_records, record, write_run

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.monitoring.run_files import FINISHED, STOPPED, TRAINING, RunFiles, find_runs, is_run


def opened(folder: Path) -> RunFiles:
    return RunFiles(Storage(str(folder)), folder.name)


def test_a_run_is_read_as_it_grows(tmp_path: Path) -> None:
    run = opened(write_run(tmp_path / "run"))
    assert (run.step, run.steps, sorted(run.grids), run.checkpoints) == (100, 100, [50, 100], [100])
    assert run.seconds() == pytest.approx(100 * 32 / 64)
    add_records(run_folder := tmp_path / "run", record(110))
    with (run_folder / "log.jsonl").open("a") as file:
        file.write('{"step": 120, "lo')  # a record that is being written
    add_grid(run_folder, 110)
    run.refresh()
    assert (run.step, sorted(run.grids), run.unreadable) == (110, [50, 100, 110], 0)
    with (run_folder / "log.jsonl").open("a") as file:
        file.write('ss": 0.5}\n')
    run.refresh()
    assert run.last == {"step": 120, "loss": 0.5}
    assert run.series()["evaluation/clip"] == {"x": [100], "y": [0.31]}
    assert run.series()["loss_by_time/0.00-0.50"]["x"] == list(range(10, 111, 10))


@pytest.mark.parametrize("regrown", [0, 1, 30])
def test_a_log_that_a_resumed_run_has_cut_is_read_again(tmp_path: Path, regrown: int) -> None:
    run = opened(write_run(tmp_path / "run"))
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/log.jsonl").write_text("".join(lines[:4]))
    add_records(tmp_path / "run", *(record(41 + n, loss=7.0) for n in range(regrown)))
    run.refresh()
    assert [one["step"] for one in run.records] == [10, 20, 30, 40, *range(41, 41 + regrown)]


def test_a_long_log_is_thinned_for_the_page(tmp_path: Path) -> None:
    run = opened(write_run(tmp_path / "run", range(1, 3001)))
    curve = run.series(most=100)["loss"]
    assert len(curve["x"]) == len(curve["y"]) == 100
    assert curve["x"][-1] == 3000


LINES: list[Any] = ["not JSON", "[1]", "7", '{"loss": 1}', '{"step": "10"}', "[" * 100_000, "\x00\xff"]


def test_lines_that_are_no_records_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "log.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in LINES)
        file.write(json.dumps({"step": 200, "loss": float("nan"), "lr": 10**400, "blend": {"a": [1]}}) + "\n")
    run = opened(folder)
    assert (run.step, run.unreadable) == (200, len(LINES))
    assert run.series()["loss"]["x"][-1] == 100
    assert run.last_of("loss") == pytest.approx(0.01)


def test_names_are_taken_by_pattern_only(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", grids=())
    (folder / "samples").mkdir()
    for name in ("step-1.png", "step-000001.png.exe", "step-000001.jpg", "other.png"):
        (folder / "samples" / name).write_bytes(b"")
    (folder / "samples/step-000002.png").symlink_to("/etc/passwd")
    assert opened(folder).grids == {}


def test_its_state_is_that_of_its_lock(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    run = opened(folder)
    assert run.state == STOPPED
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run.state == TRAINING
    (folder / "finished.json").write_text('{"steps": 100}')
    run.refresh()
    assert run.state == FINISHED


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a", "seeds/one", "a/best/inner", "deep/er/than/that"):
        write_run(tmp_path / name)
    layer = tmp_path / "ds/captions/x"
    layer.mkdir(parents=True)
    (layer / "recipe.json").write_text('{"engine": "coca"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/recipe.json").write_text("{")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    storage = Storage(str(tmp_path))
    assert [run.name for run in find_runs(storage)] == ["a", "b", "seeds/one"]
    assert [run.name for run in find_runs(storage, known=["a", "b"])] == ["seeds/one"]
    assert [run.name for run in find_runs(storage.folder("a"))] == ["a"]
    assert not is_run(storage.folder("ds/captions/x"))
    with pytest.raises(RecipeError, match="no training run"):
        RunFiles(storage.folder("ds"), "ds")


def test_grids_compare_if_their_prompts_are_the_same(tmp_path: Path) -> None:
    one, same = (opened(write_run(tmp_path / name)) for name in "ab")
    other = opened(write_run(tmp_path / "c", prompts=["a blue square"]))
    assert one.prompts == same.prompts != other.prompts
