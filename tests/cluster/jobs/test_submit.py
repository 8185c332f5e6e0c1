"""submit and jobs on this machine: real processes, their output, exit codes, and stopping them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from capstan.cluster.cli import run
from capstan.cluster.jobs.store import find, records, state_of
from capstan.cluster.targets.local import Local


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CAPSTAN_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CAPSTAN_CLUSTERS", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    for record in records():
        if not state_of(record).is_final:
            record.open().stop(record.handle)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with a mistake that only the command finds."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dataset": str(tmp_path / "ds"), "source": {"path": "no/such.parquet"}}))
    return path


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_the_jobs_exit_code_and_output_are_those_of_submit(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = run(["submit", "--wait", "--json", "--", "build", str(recipe)])
    out, err = capfd.readouterr()
    assert code == 2
    assert "error: source.path: " in err
    summary = json.loads(out.splitlines()[-1])
    assert (summary["status"], summary["exit_code"]) == ("failed", 2)


def test_a_job_is_listed_asked_and_read(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--json", "--", "schema-of-nothing"]) == 0
    job = last_line(capsys)["job"]
    assert run(["jobs", "logs", "-f", job]) == 0
    assert "No such command" in capsys.readouterr().out
    assert run(["jobs", "status", job[:-2], "--json"]) == 0
    assert last_line(capsys)["exit_code"] == 2
    assert run(["jobs", "list", "--json"]) == 0
    (row,) = last_line(capsys)["jobs"]
    assert (row["job"], row["target"], row["status"]) == (job, "local", "failed")
    assert run(["jobs", "stop", job]) == 1
    assert run(["jobs", "status", "no-such-job"]) == 2


def test_a_recipe_whose_job_runs_is_not_submitted_again(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--json", "--", "build", str(recipe)]) == 0
    job = last_line(capsys)["job"]
    assert run(["submit", "--", "build", str(recipe)]) == 2  # the job starts python and torch: it lives for a second
    err = capsys.readouterr().err
    assert f"job {job} of this recipe is still running on local" in err
    assert f"capstan jobs stop {job}" in err
    assert run(["jobs", "stop", job]) == 0
    while not state_of(find(job)).is_final:
        time.sleep(0.05)
    assert run(["submit", "--wait", "--", "build", str(recipe)]) == 2
    assert len(records()) == 2


def test_a_job_that_is_gone_without_an_exit_code_is_lost(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--json", "--", "build", str(recipe)]) == 0
    record = find(last_line(capsys)["job"])
    os.killpg(record.handle["pid"], 9)
    while Local(name="local").state(record.handle).status == "running":
        time.sleep(0.02)
    assert state_of(record).status == "lost"
    assert run(["submit", "--wait", "--", "build", str(recipe)]) == 2  # and it stands in nobody's way


def test_a_dry_run_prints_and_sends_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("clusters.yaml").write_text("lab: {kind: ray, address: 'http://127.0.0.1:9'}\n")
    bucket = yaml.safe_load(recipe.read_text()) | {
        "dataset": "s3://bucket/ds",
        "source": {"path": "s3://bucket/rows.parquet"},
    }
    recipe.write_text(yaml.safe_dump(bucket))
    assert run(["submit", "--to", "lab", "--dry-run", "--", "build", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "entrypoint: capstan build recipe.yaml" in out
    assert "dataset: s3://bucket/ds" in out
    assert records() == []
    assert run(["submit", "--to", "lab", "--", "build", str(recipe)]) == 1
    assert "cannot reach http://127.0.0.1:9" in capsys.readouterr().err
    assert records() == []


WRONG = [
    (["submit", "--to", "lap", "--", "build", "recipe.yaml"], "did you mean lab?"),
    (["submit", "--to", "lab", "--", "build", "recipe.yaml"], "is relative to a folder on this machine"),
    (["submit", "--", "submit", "--", "build"], "not a command that can run elsewhere"),
    (["submit", "--", "build", "recipe.yaml", "--set", "storage.secret=abc"], "storage.secret: is a secret"),
    (["submit", "--", "build", "recipe.yaml", "--set", "imgae.size=3"], "did you mean image?"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_cannot_work_there_is_said_here(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    Path("clusters.yaml").write_text("lab: {kind: ray, address: 'http://127.0.0.1:9'}\n")
    recipe.write_text(yaml.safe_dump({"dataset": "./ds", "source": {"format": "world"}}))
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert records() == []


def test_files_travel_by_name_and_are_not_mixed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("clusters.yaml").write_text("lab: {kind: ray, address: 'http://127.0.0.1:9'}\n")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "keys.txt").write_text(folder)
    command = ["submit", "--to", "lab", "--dry-run", "--", "remove", "s3://b/ds", "--keys", "a/keys.txt"]
    assert run(command) == 0
    assert "remove s3://b/ds --keys keys.txt" in capsys.readouterr().out
    assert run([*command, "--urls", "b/keys.txt"]) == 2


def test_a_job_outlives_its_terminal(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "capstan", "submit", "--json", "--", "build", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        job = json.loads(process.communicate()[0].splitlines()[-1])["job"]
    record = find(job)
    while not (state := state_of(record)).is_final:
        time.sleep(0.1)
    assert (state.status, state.code) == ("failed", 2)
