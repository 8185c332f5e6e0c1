"""What a stage says while it runs: plain lines when nobody watches a terminal."""

import io
import time

import pytest

from pipeline import progress
from pipeline.progress import Progress


def test_plain_lines_while_it_runs_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.05)
    stream = io.StringIO()
    reported = {"samples": 30, "failed.timeout": 2, "failed.http_404": 5, "quarantined": 1}
    with Progress("ingest", 10, already=4, poll=lambda: reported, stream=stream) as bar:
        bar.advance(3)
        time.sleep(0.3)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 2
    assert "ingest" in lines[0]
    assert "7/10 units" in lines[0]
    assert "ETA" in lines[0]
    assert "failed: http_404 5, timeout 2" in lines[-1]
    assert "quarantined 1" in lines[-1]
    assert "samples/s" in lines[-1]


def test_the_eta_comes_from_what_this_run_did() -> None:
    bar = Progress("x", 10, already=5, enabled=False)
    assert bar._eta(10.0) == "–"
    bar.advance(1)
    assert bar._eta(10.0) == "0:40"


def test_it_can_be_silent() -> None:
    stream = io.StringIO()
    with Progress("x", None, enabled=False, stream=stream) as bar:
        bar.advance()
    assert stream.getvalue() == ""
