"""A build in a process of its own, killed at chosen moments: the next one ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capstan.pipeline import build
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration

SCRIPT = """
import json, sys
from capstan.pipeline.config import Recipe
from capstan.pipeline.build import build
print(json.dumps(build(Recipe.model_validate_json(sys.argv[1]))))
"""


def recipe(folder: Path, cpus: int, executor: str = "auto") -> dict[str, Any]:
    """A small captioned world, fetched over HTTP, with the web's defects."""
    return {
        "dataset": str(folder),
        "source": {"format": "world", "world": {"scenes": 150, "size": 64}},
        "image": {"size": 32, "min_size": 24},
        "select": [{"name": "size", "where": "least(width, height) >= 30"}],
        "unit": {"rows": 20},
        "shards": {"samples": 25},
        "resources": {"cpus": cpus, "executor": executor},
    }


def start(folder: Path, cpus: int = 2, executor: str = "auto", **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, json.dumps(recipe(folder, cpus, executor))]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The summary, which is all that stdout may carry."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


def wait(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def when(process: subprocess.Popen[str], ready: Callable[[], bool], signal_: signal.Signals) -> None:
    """Send `signal_` as soon as `ready`, and wait for the end."""
    wait(process, ready)
    os.kill(process.pid, signal_)
    process.communicate(timeout=300)


def published(folder: Path) -> dict[str, bytes]:
    storage = Storage(str(folder))
    return {name: storage.read(name) for name in storage.names() if not name.startswith(("state/", "staged/"))}


def content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in published(folder).items() if name != "dataset.json"}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset.json").read_bytes())


def some(folder: Path, pattern: str, at_least: int = 1) -> Callable[[], bool]:
    """Whether there are so many files."""
    return lambda: len(list(folder.glob(pattern))) >= at_least


def test_killed_builds_end_with_the_bytes_of_an_undisturbed_one(tmp_path: Path, two_cpus: Resources) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    summary = finish(start(whole, cpus=1, executor="ray"))
    assert summary["counts"]["kept"] > 75
    assert summary["counts"]["shards"] >= 4
    assert {"http_404", "not_an_image"} <= summary["failed"].keys()

    when(start(torn), some(torn, "state/ingest-*/done/*.json", 3), signal.SIGKILL)
    assert not (torn / "dataset.json").exists()
    when(start(torn), some(torn, "shards/*.tar", 2), signal.SIGKILL)
    assert not (torn / "dataset.json").exists()
    build.build(Recipe.model_validate(recipe(torn, cpus=2)), progress=False)

    assert content(torn) == content(whole)
    assert manifest(torn) == manifest(whole)
    assert verify(Storage(str(torn))) == []


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of three node processes on loopback: a head that only keeps books, and two workers."""
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick})
    made.workers = [made.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.mark.cluster
def test_a_killed_node_costs_only_time(tmp_path: Path, cluster: Any) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    finish(start(whole, RAY_ADDRESS=cluster.address))
    process = start(torn, RAY_ADDRESS=cluster.address)
    wait(process, some(torn, "state/ingest-*/done/*.json", 3))
    (raylet,) = cluster.workers[0].all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGKILL)
    finish(process)

    assert not (torn / "state/pack/quarantine").exists()
    assert content(torn) == content(whole)
    assert manifest(torn) == manifest(whole)
    assert verify(Storage(str(torn))) == []
