"""Running work on the page: units, rows and failures of a build while it runs, and the rows that came since."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import browser
import hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import run_all_here
from small_views import Viewing, draw, wait

from capstan.pipeline import units
from capstan.pipeline.build import build
from capstan.pipeline.config import Recipe
from capstan.pipeline.report.running import WINDOW_S, Running
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration


class Slow:
    """A build that stages two units, waits until `go` is set, and then finishes."""

    def __init__(self, folder: Path) -> None:
        rows = [hostile.row(number, draw) for number in range(hostile.ROWS)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        self.recipe = hostile.recipe(str(folder), str(folder / "rows.parquet")) | {"resources": {"cpus": 1}}
        self.staged, self.go = threading.Event(), threading.Event()
        self._patch = pytest.MonkeyPatch()
        for module in ("build", "pack.job"):  # Ray would take ten seconds to start
            self._patch.setattr(f"capstan.pipeline.{module}.run", self._run)
        self._thread = threading.Thread(
            target=lambda: build(Recipe.model_validate(self.recipe), progress=False), daemon=True
        )

    def _run(self, job: units.Job, work: Iterable[units.Unit], *some: Any, **named: Any) -> units.Summary:
        work = list(work)
        if job.name.startswith("ingest-"):
            run_all_here(job, work[:2])
            self.staged.set()
            self.go.wait(300)
        return run_all_here(job, work, *some, **named)

    def __enter__(self) -> Slow:
        self._thread.start()
        assert self.staged.wait(300)
        return self

    def finish(self) -> None:
        self.go.set()
        self._thread.join(300)

    def __exit__(self, *_: object) -> None:
        self.finish()
        self._patch.undo()


def test_progress_is_read_from_markers(tmp_path: Path) -> None:
    with Slow(tmp_path) as slow:
        storage = Storage(slow.recipe["dataset"])
        running = Running(storage)
        found = running.look(now=0)
        (stage,) = found["stages"]
        assert (stage["done"], stage["total"], stage["samples"], stage["units_per_minute"]) == (2, 3, 40, None)
        assert sum(stage["failed"].values()) == found["staged"]["rows"] - found["staged"]["images"] > 0
        assert [writer["command"] for writer in found["writers"]] == ["build"]
        assert found["finished"] is False
        slow.finish()
        found = running.look(now=60)
        stages = {stage["title"]: stage for stage in found["stages"]}
        ingest = stages["Ingest"]
        assert (ingest["done"], ingest["units_per_minute"], ingest["left_s"]) == (3, 1.0, 0)
        assert ingest["samples_per_s"] == (found["staged"]["rows"] - 40) / 60
        assert (found["finished"], found["writers"]) == (True, [])
        idle = running.look(now=60 + 2 * WINDOW_S), running.look(now=61 + 3 * WINDOW_S)
        assert idle[-1]["stages"][0]["units_per_minute"] is None


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
def test_the_page_follows_a_build(tmp_path: Path) -> None:
    binary = browser.find()
    assert binary is not None
    box = "document.getElementById('running')"
    with (
        Slow(tmp_path) as slow,
        Viewing(Path(slow.recipe["dataset"]), "--read-only") as viewing,
        browser.start(binary) as chromium,
    ):
        threading.Timer(3.0, slow.finish).start()
        visit = chromium.visit(
            viewing.url,
            wait(f"{box}.querySelector('.stage')", f"{box}.innerText"),
            "document.getElementById('counts').textContent",
            wait(f"{box}.querySelector('button')"),
            wait(f"!{box}.innerText.includes('capstan build,')", f"{box}.innerText"),
            f"{box}.querySelector('button').click()",
            wait("document.getElementById('counts')?.textContent.includes(' kept')"),
            "document.documentElement.scrollWidth <= innerWidth",
            width=390,
        )
    first, counts, changed, after = *visit.answers[:3], visit.answers[3]
    assert "capstan build, process" in first
    assert "2 of 3 units" in first
    assert "failed: " in first
    assert "Staged: 40 of " in first
    assert "not finished" in counts
    assert changed is True
    assert "The dataset has changed" in after
    assert visit.answers[5:] == [True, True]
    assert visit.problems == []
