"""The report of a run: one file, no script, readable for any run folder."""

from __future__ import annotations

import json
from pathlib import Path

import browser
import pytest
from run_folders import record, write_run
from typer.testing import CliRunner

from capstan.cluster.cli import app
from capstan.pipeline.storage import Storage
from capstan.training.monitoring.run_files import RunFiles
from capstan.training.monitoring.run_report import report_of_run, run_report

SCRIPT = "<script>window.ran = 1</script>"


def test_the_report_has_its_parts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "my run", prompts=[SCRIPT])
    (folder / "train.log").write_text("2026-01-01 INFO engine: DeepSpeed, world size 2\n")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    text = (folder / "report.html").read_text()
    for part in ("Curves", "Samples", "Evaluation", "Cost", "Versions", "Recipe", "Loss by timestep", "Captions shown"):
        assert part in text
    assert "DeepSpeed, world size 2" in text
    assert "2.15.0" in text
    assert "<script" not in text
    assert text.count("data:image/jpeg") == 2


def test_many_grids_are_few_and_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", grids=range(10, 400, 10))
    (folder / "samples/step-000390.png").write_bytes(b"not an image")
    text = run_report(RunFiles(Storage(str(folder)), "run"))
    assert text.count("data:image/jpeg") == 7  # of eight from first to last, one cannot be read
    assert len(text) < 5_000_000


@pytest.mark.parametrize(
    "records",
    [[], [record(1)], [{"step": 1}], [record(1, loss=-1.0), record(2, loss=0.0, lr=0.0)], [record(3, loss=None)]],
)
def test_a_run_with_little_in_it_has_a_report(tmp_path: Path, records: list[dict[str, float]]) -> None:
    folder = write_run(tmp_path / "run", [], grids=(), watch=None, batch=None, lr="high")
    (folder / "evaluations.jsonl").write_text('{"step": 3, "measures": 7}\n')
    with (folder / "log.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in records)
    assert "Curves" in run_report(RunFiles(Storage(str(folder)), "run"))


def test_what_is_no_run_has_none(tmp_path: Path) -> None:
    assert report_of_run(Storage(str(tmp_path))) is None


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
def test_it_fits_a_phone(tmp_path: Path) -> None:
    binary, folder = browser.find(), write_run(tmp_path / ("run" * 40))
    assert binary is not None
    report_of_run(Storage(str(folder)))
    with browser.start(binary) as chromium:
        visit = chromium.visit(folder / "report.html", "document.documentElement.scrollWidth <= innerWidth", width=390)
    assert (visit.answers, visit.problems, len(visit.requests)) == ([True], [], 1)
