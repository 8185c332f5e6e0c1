"""A dataset too large to read at once, and one in a bucket: a sample first, then the index; images by byte range."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import browser
import pytest
import s3
from small_views import Viewing, wait, write_viewed

from capstan.cluster.view.server import serve
from capstan.pipeline.report import query, row_index
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
def test_the_page_answers_from_a_sample_until_the_index_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary, go, address = browser.find(), threading.Event(), list[str]()
    assert binary is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (query, row_index):
        monkeypatch.setattr(module, "SAMPLE", 20)
    build: Callable[[row_index.RowIndex], None] = row_index.RowIndex.build

    def slowly(index: row_index.RowIndex) -> None:
        go.wait(300)
        build(index)

    monkeypatch.setattr(row_index.RowIndex, "build", slowly)
    storage, loop, ready = Storage(str(write_viewed(tmp_path))), asyncio.new_event_loop(), threading.Event()
    task = loop.create_task(serve(storage, 0, browser=False, ready=lambda url: (address.append(url), ready.set())[1]))
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])))
    thread.start()
    assert ready.wait(300)
    title, rows = "document.querySelector('#rows .total').textContent", "document.querySelector('#side h2').textContent"
    try:
        with browser.start(binary) as chromium:
            threading.Timer(4.0, go.set).start()
            answers = chromium.visit(
                address[0] + "#outcome=kept",
                wait("document.querySelector('#rows .total')", title),
                rows,
                wait(f"!{title}.includes('sample') && {rows} === 'Rows'", title),
            ).answers
    finally:
        go.set()
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()
    assert answers[0].startswith("about ")
    assert answers[0].endswith(" by a sample")
    assert answers[1] == "Rows (by a sample)"
    assert answers[2].removesuffix(" rows").isdecimal()


def test_a_dataset_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_viewed(tmp_path)
    server = s3.S3(tmp_path / "s3", "viewers-key", "viewers-secret")
    dataset.rename(server.folder / "bucket" / "ds")
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    with (
        server,
        Viewing("s3://bucket/ds", "--set", f"storage.endpoint_url=http://127.0.0.1:{server.port}") as viewing,
    ):
        kept = viewing.json("/api/rows?outcome=kept")["rows"]
        assert len(kept) > 10
        for side in (0, 256):
            assert viewing.get(f"/image/{kept[0]['key']}/{side}")[2].startswith(b"\xff\xd8")
        assert viewing.json(f"/api/row/{kept[0]['key']}")["captions"]
        assert viewing.json("/api/running")["finished"] is True
