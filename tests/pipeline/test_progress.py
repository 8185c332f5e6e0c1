"""What a stage says while it runs: one display on a terminal, plain lines when nobody watches one."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from capstan.pipeline import progress
from capstan.pipeline.progress import Progress

REPORTED = {"samples": 300, "bytes": 3e6, "failed.timeout": 2, "failed.http_404": 5, "failed.dns": 1, "failed.tls": 1}


def test_plain_lines_while_it_runs_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.05)
    stream = io.StringIO()
    with Progress("ingest", 10, already=4, poll=lambda: REPORTED, stream=stream) as bar:
        bar.advance(3, {"quarantined": 1})
        time.sleep(0.3)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 2
    for line in lines:
        assert line.startswith("ingest     7/10 units · ")
        assert "samples/s" in line
        assert "MB/s" in line
        assert line.endswith("ok 291 · quarantined 1 · failed 9 (3.0%): http_404 5, timeout 2, dns 1, 1 more")
    assert "ETA 0:00" in lines[0]
    assert "ETA" not in lines[-1]


def at(bar: Progress, seconds: float, samples: float = 0) -> Progress:
    bar.counts |= {"samples": samples, "bytes": samples * 1e5}
    bar.note(seconds)
    return bar


def test_the_rate_is_the_latest_one() -> None:
    bar = Progress("x", 10, samples=10_000, enabled=False)
    for second in range(0, 61, 5):
        at(bar, second, samples=10 * second)
    assert "10.0 samples/s · 1.0 MB/s" in bar.line()
    for second in range(65, 121, 5):
        at(bar, second, samples=600 + 100 * (second - 60))
    assert "100.0 samples/s · 10.0 MB/s" in bar.line()
    assert bar.eta() == "0:34"  # 3,400 of the 10,000 samples are left
    for second in range(125, 201, 5):
        at(bar, second, samples=6600)
    assert "0.0 samples/s" in bar.line()
    assert bar.eta() == "–"


def test_the_eta_comes_from_what_this_run_did() -> None:
    bar = Progress("x", 10, already=5, enabled=False)
    assert bar.eta() == "–"
    bar.advance(1)
    assert at(bar, 10.0).eta() == "0:40"
    assert at(bar, 100.0).eta() == "6:40"  # no unit came for long, and none is forgotten


def test_with_known_samples_the_eta_need_not_wait_for_a_unit() -> None:
    bar = Progress("x", 2, samples=1000, enabled=False)
    assert at(at(bar, 0.0), 10.0, samples=250).eta() == "0:30"
    bar.advance(1)
    assert at(bar, 20.0, samples=400).eta() == "0:20"  # the unit is done, whatever was reported of it


def test_the_time_in_which_workers_start_is_not_their_pace() -> None:
    bar = Progress("x", 2, samples=1000, enabled=False)
    assert at(at(bar, 30.0), 31.0, samples=100).eta() == "0:09"
    assert "100.0 samples/s" in bar.line()


def test_it_can_be_silent() -> None:
    stream = io.StringIO()
    with Progress("x", None, enabled=False, stream=stream) as bar:
        bar.advance()
    assert stream.getvalue() == ""


SCRIPT = """
import logging, sys, time
from capstan.pipeline.progress import Progress
logging.basicConfig(stream=sys.stderr, format="%(message)s")
with Progress("ingest", 4, samples=400, poll=lambda: {"samples": 100, "failed.dns": 7}) as bar:
    time.sleep(0.8)
    logging.getLogger("x").warning("a line from the log")
    bar.advance(4)
    time.sleep(0.6)
logging.getLogger("x").warning("after it")
"""


def test_on_a_terminal_it_is_redrawn_in_place_and_logs_stand_above() -> None:
    controller, terminal = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=terminal, env=env) as process:
        os.close(terminal)
        written = b""
        try:
            while data := os.read(controller, 4096):
                written += data
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(controller)
    assert process.returncode == 0
    screen = rendered(written.decode())
    assert screen[0] == "a line from the log"
    assert re.fullmatch(r"ingest     █{24} 4/4 units · [\d.]+ samples/s · 0:0[12]", screen[1])
    assert screen[2] == " " * 11 + "ok 93 · failed 7 (7.0%): dns 7"
    assert screen[3:] == ["after it"]


def rendered(written: str) -> list[str]:
    """What stands on the screen after these bytes: moves up, erased lines and carriage returns are followed."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[\d;?]*[A-Za-z]|\r|\n)", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif re.fullmatch(r"\x1b\[\d*A", part):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part and not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return [line for line in lines if line]


def test_logs_go_where_they_went_before() -> None:
    handler = logging.StreamHandler(stream := io.StringIO())
    logging.getLogger().addHandler(handler)
    try:
        with Progress("x", 1, stream=io.StringIO()):
            pass
        assert handler.stream is stream
    finally:
        logging.getLogger().removeHandler(handler)
