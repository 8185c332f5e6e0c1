"""What Prometheus sees of a running build: scraped from Ray's own exporter."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from repo import ROOT

from capstan.pipeline.config import Resources
from capstan.pipeline.errors import RecipeError

pytestmark = pytest.mark.integration

# The second unit always fails. Quarantine is a run's last act: what counts it is held on to, until it has been scraped.
SCRIPT = """
import sys, time
from capstan.pipeline.config import Resources
from capstan.pipeline.storage import Storage
from capstan.pipeline import units
from capstan.pipeline.units import Job, RayWorkers, Unit, report, run

trackers = []

class Held(RayWorkers):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        trackers.append(self.tracker)

units.RayWorkers = Held

class Slow(Job):
    name = "slow-0123abcd"
    def __init__(self, storage):
        self.storage = storage
    def prepare(self, unit):
        report({"samples": 90, "bytes": 9000})
        report({"samples": 10, "failed.timeout": 7, "failed.http_404": 3})
        if unit.id == "1":
            raise OSError("never")
        yield {}
    def commit(self, unit, pieces):
        return {}

run(Slow(Storage(sys.argv[1])), [Unit(str(n)) for n in range(6)], Resources(cpus=1, metrics_port=int(sys.argv[2])))
time.sleep(120)
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def running(tmp_path: Path, port: int) -> Iterator[subprocess.Popen]:
    """A job on a Ray of its own."""
    env = os.environ | {"RAY_METRICS_REPORT_INTERVAL_MS": "1000"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "dataset"), str(port)]
    with subprocess.Popen(command, env=env) as process:
        yield process
        process.terminate()


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Capstan's series now: (name, stage, what the other label says) → value."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
    except OSError:
        return {}  # not listening yet
    series = {}
    for line in text.splitlines():
        if found := re.fullmatch(r"(ray_capstan_\w+)\{(.*)\} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
            other = labels.get("reason") or labels.get("outcome") or ""
            series[found[1], labels["stage"], other] = float(found[3])
    return series


def test_a_running_job_can_be_watched(running: subprocess.Popen, port: int) -> None:
    wanted = {
        ("ray_capstan_samples_total", "slow", ""),
        ("ray_capstan_bytes_total", "slow", ""),
        ("ray_capstan_failed_total", "slow", "timeout"),
        ("ray_capstan_failed_total", "slow", "http_404"),
        ("ray_capstan_units_total", "slow", "committed"),
        ("ray_capstan_units_total", "slow", "retried"),
        ("ray_capstan_units_total", "slow", "quarantined"),
    }
    seen: dict[tuple[str, ...], float] = {}
    while running.poll() is None:
        seen |= scrape(port)
        if wanted <= seen.keys():
            break
        time.sleep(0.5)
    assert wanted <= seen.keys()
    samples, failed = seen["ray_capstan_samples_total", "slow", ""], seen["ray_capstan_failed_total", "slow", "timeout"]
    assert samples % 100 == 0
    assert failed == pytest.approx(samples * 0.07)
    assert seen["ray_capstan_bytes_total", "slow", ""] == samples * 90
    assert seen["ray_capstan_units_total", "slow", "quarantined"] == 1


def test_the_series_are_documented() -> None:
    documented = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    source = (ROOT / "pipeline/units/on_ray.py").read_text(encoding="utf-8")
    names = re.findall(r'"(capstan_\w+)"', source)
    assert len(names) == 4
    assert not [name for name in names if f"| `ray_{name}` |" not in documented]


def test_a_taken_port_is_named(port: int) -> None:
    from capstan.pipeline.units.ray_session import _check_free

    with socket.create_server(("127.0.0.1", port)), pytest.raises(RecipeError, match=r"resources.metrics_port: .*Fix"):
        _check_free(port)
    _check_free(port)
    _check_free(Resources().metrics_port)
