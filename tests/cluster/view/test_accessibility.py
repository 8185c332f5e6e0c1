"""Every page for everybody: no serious finding of axe-core, nothing beside the screen; two widths, two themes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import axe
import browser
import pytest
from run_folders import write_run
from small_views import Viewing, wait, write_viewed

from capstan.pipeline.report.query import Rows
from capstan.pipeline.report.report import report
from capstan.pipeline.storage import Storage
from capstan.training.monitoring.run_files import RunFiles
from capstan.training.monitoring.run_report import run_report

pytestmark = [pytest.mark.integration, pytest.mark.skipif(browser.find() is None, reason="needs Chromium")]
SCREENS = [(1280, False), (1280, True), (390, False), (390, True)]


@pytest.fixture(scope="module")
def viewing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewing]:
    with Viewing(write_viewed(tmp_path_factory.mktemp("view"))) as running:
        yield running


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewing]:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        write_run(folder / name)
    with Viewing(folder) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    binary = browser.find()
    assert binary is not None
    with browser.start(binary) as started:
        yield started


@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_a_dataset(viewing: Viewing, chromium: browser.Browser, width: int, dark: bool) -> None:
    press = "[...document.querySelectorAll('button')].find(b => b.textContent.startsWith('{}')).click()"
    answers = chromium.visit(
        viewing.url,
        axe.source(),
        wait("document.body.dataset.ready === 'yes'"),
        "document.querySelectorAll('details').forEach(one => { one.open = true; })",
        axe.FINDINGS,
        axe.FITS,
        press.format("Show a table"),
        wait("document.querySelector('#rows table')"),
        axe.FINDINGS,
        axe.FITS,
        press.format("duplicate"),
        wait("document.querySelector('#rows td.word')?.textContent === 'duplicate'"),
        "document.querySelector('#rows .thumb').click()",
        wait("document.querySelector('dialog[open] dl')"),
        axe.FINDINGS,
        axe.FITS,
        width=width,
        dark=dark,
    ).answers
    assert [answers[place] for place in (1, 6, 10, 12)] == [True] * 4
    assert [answers[place] for place in (3, 7, 13)] == [[], [], []]
    assert [answers[place] for place in (4, 8, 14)] == [True] * 3


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
@pytest.mark.parametrize("tab", ["Duplicates", "Compare captions"])
def test_other_tabs(viewing: Viewing, chromium: browser.Browser, tab: str, width: int, dark: bool) -> None:
    button = f"[...document.querySelectorAll('header button')].find(b => b.textContent === '{tab}')"
    answers = chromium.visit(
        viewing.url,
        axe.source(),
        wait("document.body.dataset.ready === 'yes'"),
        f"{button}.click()",
        wait(f"{button}.getAttribute('aria-pressed') === 'true' || {button}.hasAttribute('aria-current')"),
        axe.FINDINGS,
        axe.FITS,
        width=width,
        dark=dark,
    ).answers
    assert answers[3:] == [True, [], True]


@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_runs(runs: Viewing, chromium: browser.Browser, width: int, dark: bool) -> None:
    answers = chromium.visit(
        runs.url,
        axe.source(),
        wait("document.body.dataset.ready === 'yes' && document.querySelectorAll('.chart svg').length > 3"),
        axe.FINDINGS,
        axe.FITS,
        width=width,
        dark=dark,
    ).answers
    assert answers[1:] == [True, [], True]


@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_reports(
    viewing: Viewing, runs: Viewing, chromium: browser.Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    dataset, folder = (Path(one.process.args[4]) for one in (viewing, runs))  # type: ignore[index]
    with Rows(Storage(str(dataset))) as rows:
        (tmp_path / "dataset.html").write_text(report(rows))
    (tmp_path / "run.html").write_text(run_report(RunFiles(Storage(str(folder / "a")), "a")))
    for name in ("dataset.html", "run.html"):
        answers = chromium.visit(tmp_path / name, axe.source(), axe.FINDINGS, axe.FITS, width=width, dark=dark).answers
        assert answers[1:] == [[], True], name


def test_the_library_finds_what_is_wrong(chromium: browser.Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<html><title>x</title><p style="color:#aaa;background:#bbb">pale</p><img src="x.png"></html>')
    (_, found) = chromium.visit(page, axe.source(), axe.FINDINGS).answers
    assert {line.partition(":")[0] for line in found} >= {"color-contrast", "image-alt", "html-has-lang"}
