"""Runs in the viewer: the table, one slider over all grids, curves, and a run that trains meanwhile."""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from run_folders import add_grid, add_records, record, write_run
from small_views import Viewing, wait

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, one of them with a name that is markup."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "<img src=x onerror=alert(1)>", grids=(20, 50, 100))
    write_run(folder / "live")
    write_run(folder / "other" / "plain", grids=(), watch={})
    return folder


@pytest.fixture(scope="module")
def viewing(folder: Path) -> Iterator[Viewing]:
    with Viewing(folder) as running:
        yield running


def test_it_answers_about_runs(viewing: Viewing) -> None:
    runs = {run["name"]: run for run in viewing.json("/api/runs")["runs"]}
    assert sorted(runs) == ["<img src=x onerror=alert(1)>", "live", "other/plain"]
    live = runs["live"]
    assert (live["grids"], live["checkpoints"], live["evaluation"]) == ([50, 100], [100], {"clip": 0.31})
    assert viewing.json(f"/api/run/{live['id']}")["series"]["loss"]["x"][0] == 10
    assert viewing.get(f"/grid/{live['id']}/50")[2].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "path", ["/api/run/x", "/api/run/" + "0" * 16, "/grid/{id}/51", "/grid/{id}/..", "/grid/{id}/²"]
)
def test_paths_lead_nowhere_else(viewing: Viewing, path: str) -> None:
    run = viewing.json("/api/runs")["runs"][1]["id"]
    assert viewing.get(path.replace("{id}", run).replace("²", "%C2%B2"))[0] == 404


def test_only_the_token_opens_it(viewing: Viewing) -> None:
    cookie, viewing.cookie = viewing.cookie, {}
    try:
        assert viewing.get("/api/runs")[0] == 401
    finally:
        viewing.cookie = cookie


def test_numbers_that_json_does_not_know_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    add_records(folder, record(200, loss=float("nan"), lr=float("inf")))
    (folder / "evaluations.jsonl").write_text('{"step": 1, "measures": {"clip": NaN}}\n')
    with Viewing(folder) as running:
        for path in ("/api/runs", f"/api/run/{running.json('/api/runs')['runs'][0]['id']}"):
            json.loads(running.get(path)[2], parse_constant=pytest.fail)


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_one_slider_moves_all_grids(viewing: Viewing, width: int, dark: bool) -> None:
    binary = browser.find()
    assert binary is not None
    shown = (
        "[...document.querySelectorAll('.sheets img')].map(image => Number(image.getAttribute('src').split('/')[3]))"
    )
    slide = (
        "(() => { const s = document.getElementById('step'); s.value = %d; s.dispatchEvent(new Event('input')); })()"
    )
    with browser.start(binary) as chromium:
        visit = chromium.visit(
            viewing.url,
            wait("document.body.dataset.ready === 'yes'"),
            shown,
            slide % 0,
            shown,  # the second run has none as early: its first
            slide % 1,
            shown,
            "location.hash",
            wait("[...document.querySelectorAll('.sheets img')].every(image => image.complete && image.naturalWidth)"),
            "[...document.querySelectorAll('.chart h3')].map(one => one.textContent)",
            "document.querySelectorAll('#runs input')[0].click(); document.querySelectorAll('.sheets img').length",
            "document.getElementById('logy').click(); document.getElementById('logx').click(); "
            "document.querySelectorAll('.chart path').length",
            "document.documentElement.scrollWidth <= innerWidth && window.ran === undefined",
            width=width,
            dark=dark,
        )
    answers = visit.answers
    assert answers[:2] == [True, [100, 100]]
    assert (answers[3], answers[5]) == ([20, 50], [50, 50])
    assert answers[6] == "#step=50"
    assert answers[7] is True
    assert {"Loss", "Learning rate", "Evaluation: clip", "Loss by timestep: live"} <= set(answers[8])
    assert answers[9] == 1
    assert answers[10] > 10
    assert answers[11] is True
    assert visit.problems == []


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
def test_the_page_follows_a_run_that_trains(viewing: Viewing, folder: Path) -> None:
    binary, run = browser.find(), folder / "live"
    assert binary is not None
    row = "[...document.querySelectorAll('#runs tr')].find(one => one.textContent.includes('live')).children"

    def train() -> None:
        add_grid(run, 110)
        add_records(run, record(110))

    with (run / "lock").open("w") as lock, browser.start(binary) as chromium:
        timer = threading.Timer(1.0, train)
        fcntl.flock(lock, fcntl.LOCK_EX)
        timer.start()
        answers = chromium.visit(
            viewing.url,
            wait("document.getElementById('counts').textContent.includes('1 training')"),
            wait(f"{row}[3].textContent === '110 of 100'"),
            wait("document.querySelector('#step + output').textContent === 'step 110'"),
            wait(f"{row}[2].textContent === 'training'"),
        ).answers
        timer.join()
    assert answers == [True] * 4
