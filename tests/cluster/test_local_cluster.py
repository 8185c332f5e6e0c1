"""build → recaption → train on a Ray cluster of several nodes over a bucket, with nodes that are lost and answers that
are spoilt: it ends with the bytes, captions and sample sequence of an untouched run. `make test-cluster`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from repo import HELPERS, ROOT
from s3 import FAULTS, S3, Faulty
from small_captioner import write_captioner

from capstan.cluster.local_cluster import Nodes

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

CANARY = "canary-Qx7Lw2nVt9"  # in the secret key: nothing that is written may hold it
GPU_NODE = {"cpus": 1, "gpus": 1, "labels": {"accelerator": "gpu"}}
SEEN_SOON = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
STAGES = ["build", "recaption", "train"]


@dataclass
class Place:
    """One dataset and one run, in a bucket behind some port and beside it."""

    folder: Path
    s3: S3
    name: str
    port: int | None = None
    captioner: str = ""
    sleep_s: float = 0.0

    @property
    def dataset(self) -> Path:
        """Where the server keeps the dataset."""
        return self.s3.folder / "bucket" / self.name

    @property
    def run(self) -> Path:
        return self.folder / self.name / "run"

    def recipe(self) -> Path:
        content: dict[str, Any] = {
            "dataset": f"s3://bucket/{self.name}",
            "storage": self.s3.storage(self.port),
            "source": {"format": "world", "world": {"scenes": 300, "size": 64}},
            "image": {"size": 32, "min_size": 24},
            "fetch": {"retries": 1},
            "unit": {"rows": 12},
            "shards": {"samples": 12},
            "dedup": {"exact": True, "perceptual": None},
            "recaption": {"model": self.captioner, "batch": 4},
            "train": {
                "model": "recording:RecordingFamily",
                "run": str(self.run),
                "steps": 40,
                "batch": 8,
                "log_every": 1,
                "warmup": 2,
                "lr": 0.01,
                "data": {"blend": {"descriptive": 0.7, "original": 0.3}},
                "engine": {"strategy": "ddp", "workers": 2, "threads": 1, "retries": 6},
                "checkpoint": {"every": 5},
                "recording": {"sleep_s": 0.2},
            },
        }
        path = self.folder / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def count(self, pattern: str) -> int:
        return len(list(self.dataset.glob(pattern)))

    def steps(self) -> int:
        log = self.run / "log.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0


def paths() -> str:
    return os.pathsep.join([str(ROOT), str(HELPERS)])


def arguments(stage: str, recipe: Path) -> list[str]:
    """The GPU of the cluster is for captions; training is on the CPUs."""
    wants = {"recaption": ["--set", "resources.gpus=1"], "train": ["--set", "resources.gpus=0"]}
    return [stage, str(recipe), *wants.get(stage, [])]


def capstan(*command: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "capstan", *command], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[S3]:
    with S3(folder / "s3", "capstan-key", CANARY) as server:
        yield server


@pytest.fixture(scope="module")
def captioner(folder: Path) -> str:
    return str(write_captioner(folder / "captioner"))


@pytest.fixture(scope="module")
def env(folder: Path, s3: S3) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    added = {"PYTHONPATH": paths(), "CAPSTAN_STATE": str(folder / "state"), "OMP_NUM_THREADS": "1"}
    return kept | s3.env | added | {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def sound(folder: Path, s3: S3, captioner: str, env: dict[str, str]) -> Place:
    """The untouched run: plain commands on this machine, and a bucket that always answers."""
    place = Place(folder, s3, "sound", captioner=captioner)
    recipe = place.recipe()
    for stage in STAGES:
        done = capstan(stage, str(recipe), "--set", "resources.cpus=2", env=env)
        assert done.returncode == 0, done.stderr
    return place


def contents(folder: Path) -> dict[str, bytes]:
    kept = ("shards/", "ledger/", "captions/")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name.startswith(kept)}


def sequence(place: Place) -> list[tuple[int, float, float]]:
    """Of each step: its number, what it saw in which order, and the loss."""
    lines = [json.loads(line) for line in (place.run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["order"], line["loss"]) for line in lines]


def assert_like(place: Place, sound: Place) -> None:
    ours, theirs = contents(place.dataset), contents(sound.dataset)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert len([name for name in ours if name.startswith("captions/")]) > 10
    assert sequence(place) == sequence(sound)
    weights, expected = (torch.load(where.run / "product" / "weights.pt") for where in (place, sound))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def kept(place: Place) -> int:
    return int(json.loads((place.dataset / "dataset.json").read_text())["counts"]["kept"])


# Nodes that are lost -------------------------------------------------------------------------------------------------


class Cluster:
    """A head, a CPU node and a GPU node; and the command line's view of them."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.nodes, self.node_env = Nodes(folder / "ray"), {**env, **SEEN_SOON}
        self.env = {**env, "CAPSTAN_CLUSTERS": str(folder / "clusters.yaml")}
        self.nodes.start_head(env=self.node_env)
        self.cpu = self.nodes.start_worker(cpus=1, env=self.node_env)
        self.gpu = self.nodes.start_worker(**GPU_NODE, env=self.node_env)
        settings = {"kind": "ray", "address": self.nodes.address, "token_file": str(self.nodes.token_file)}
        program = f"{sys.executable} -m capstan.cluster.cli"
        target = {**settings, "program": program, "env": {"PYTHONPATH": paths()}}
        (folder / "clusters.yaml").write_text(yaml.safe_dump({"nodes": target}))

    def replace(self, which: str) -> None:
        """Take a node away with all that runs on it, and some seconds later add another of its kind."""
        self.nodes.kill(getattr(self, which))
        time.sleep(5)
        options: dict[str, Any] = GPU_NODE if which == "gpu" else {"cpus": 1}
        setattr(self, which, self.nodes.start_worker(**options, env=self.node_env))

    def submit(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return capstan("submit", "--to", "nodes", "--wait", "--json", "--", *command, env=self.env)


@pytest.fixture(scope="module")
def cluster(folder: Path, env: dict[str, str]) -> Iterator[Cluster]:
    started = Cluster(folder, env)
    with started.nodes:
        yield started


def when(ready: Callable[[], bool], act: Callable[[], None], limit_s: float = 400) -> threading.Thread:
    """Do `act` in a thread as soon as `ready`."""

    def watch() -> None:
        started = time.monotonic()
        while not ready():
            if time.monotonic() - started > limit_s:
                return
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_nodes_are_lost_in_every_stage(
    sound: Place, cluster: Cluster, folder: Path, s3: S3, captioner: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(folder, s3, "lost-nodes", captioner=captioner)
    recipe = place.recipe()
    moments: dict[str, tuple[Callable[[], bool], str]] = {
        "build": (lambda: place.count("state/ingest*/done/*.json") >= 3, "cpu"),
        "recaption": (lambda: place.count("captions/*/shard-*.parquet") >= 3, "gpu"),
        "train": (lambda: place.steps() >= 7, "cpu"),
    }
    for stage in STAGES:
        ready, which = moments[stage]
        started, lost = time.monotonic(), threading.Event()
        thread = when(ready, lambda which=which, lost=lost: (cluster.replace(which), lost.set()))  # type: ignore[misc]
        done = cluster.submit(arguments(stage, recipe))
        thread.join(60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert lost.is_set(), f"{stage} ended before a node was taken away"
        with capsys.disabled():
            print(f"\n{stage}: a {which} node was lost and another came; {time.monotonic() - started:.0f} s")
    assert_like(place, sound)
    jobs = json.loads(capstan("jobs", "list", "--json", env=cluster.env).stdout)["jobs"]
    assert [job["status"] for job in jobs] == ["succeeded"] * 3


def test_jobs_end_with_their_commands_exit_code(cluster: Cluster, folder: Path, s3: S3, captioner: str) -> None:
    recipe = Place(folder, s3, "lost-nodes", captioner=captioner).recipe()
    done = cluster.submit(["build", str(recipe), "--retry", "no-such-reason"])
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "failed"
    assert "Fix: " in done.stderr  # the command's own line


def test_a_running_job_is_seen_followed_and_stopped(cluster: Cluster, folder: Path, s3: S3, captioner: str) -> None:
    place = Place(folder, s3, "stopped", captioner=captioner)
    recipe = str(place.recipe())
    command = ("submit", "--to", "nodes", "--json", "--", "build", recipe)
    job = json.loads(capstan(*command, env=cluster.env).stdout)["job"]
    again = capstan(*command, env=cluster.env)
    assert again.returncode == 2
    assert f"job {job} of this recipe is still running on nodes" in again.stderr
    waiting = time.monotonic()
    while not place.count("state/ingest*/done/*.json"):
        assert time.monotonic() - waiting < 120
        time.sleep(0.1)
    assert json.loads(capstan("jobs", "status", job, "--json", env=cluster.env).stdout)["status"] == "running"
    assert capstan("jobs", "stop", job, env=cluster.env).returncode == 0
    followed = capstan("jobs", "logs", "-f", job, env=cluster.env)
    assert "run the same command again to resume" in followed.stdout
    assert json.loads(capstan("jobs", "status", job, "--json", env=cluster.env).stdout)["exit_code"] == 130
    assert not (place.dataset / "dataset.json").exists()


def test_the_cluster_asks_for_its_token_and_listens_on_loopback_only(cluster: Cluster, folder: Path) -> None:
    wrong = folder / "wrong-token"
    wrong.write_text("0" * 64)
    settings = {"kind": "ray", "address": cluster.nodes.address, "token_file": str(wrong)}
    (folder / "wrong.yaml").write_text(yaml.safe_dump({"nodes": settings}))
    refused = capstan(
        "submit", "--to", "nodes", "--clusters", str(folder / "wrong.yaml"), "--", "verify", "s3://b/x", env=cluster.env
    )
    assert refused.returncode == 2
    assert "rejects the token" in refused.stderr
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = {str(pid) for pid in cluster.nodes.pids()}
    open_to_all = [
        line for line in listening if any(f"pid={pid}," in line for pid in ours) and "127.0.0.1" not in line.split()[3]
    ]
    assert open_to_all == []


def test_no_secret_is_written_down_or_shown(cluster: Cluster, folder: Path, s3: S3) -> None:
    """After all of the above: the bucket, the runs, the state folder, Ray's logs, job metadata, process arguments."""
    token = cluster.nodes.token_file.read_text()
    looked = 0
    for place in (s3.folder, folder, *map(Path, cluster.nodes.temps)):
        for path in place.rglob("*"):
            if path.is_file() and path != cluster.nodes.token_file and not path.is_symlink():
                data = path.read_bytes()
                looked += 1
                assert CANARY.encode() not in data, path
                assert token.encode() not in data, path
    assert looked > 100
    from capstan.cluster.targets.ray_jobs import RayJobs

    target = RayJobs(name="nodes", address=cluster.nodes.address, token_file=str(cluster.nodes.token_file))
    with target._client() as client:
        summary = " ".join(str(info) for info in client.list_jobs())
    assert "capstan" in summary
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in cluster.nodes.pids()]
    assert lines
    for secret in (CANARY, token):
        assert secret not in summary
        assert not [line for line in lines if secret.encode() in line]


def test_a_rehearsal_has_nodes_of_its_own(folder: Path, s3: S3, captioner: str, env: dict[str, str]) -> None:
    (folder / "rehearsal.yaml").write_text(yaml.safe_dump({"rehearsal": {"kind": "local", "workers": 2}}))
    place = Place(folder, s3, "rehearsed", captioner=captioner)
    command = ["submit", "--to", "rehearsal", "--clusters", str(folder / "rehearsal.yaml"), "--wait", "--json", "--"]
    small = ["--set", "source.world.scenes=24"]
    done = capstan(*command, "build", str(place.recipe()), *small, env=env)
    assert done.returncode == 0, done.stderr
    assert (place.dataset / "dataset.json").exists()
    log = json.loads(done.stdout.splitlines()[-1])["job"]
    assert len(list((folder / "state" / "local" / log / "ray").glob("node-*.log"))) == 3


# Answers that are spoilt ---------------------------------------------------------------------------------------------


def test_a_twentieth_of_all_requests_fails(
    sound: Place, folder: Path, s3: S3, captioner: str, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    table = [
        f"\n{'stage':<12}{'requests':>10}" + "".join(f"{kind:>14}" for kind in FAULTS) + f"{'injected':>10}{'lost':>6}"
    ]
    total = 0
    for seed, stage in enumerate(STAGES):
        with Faulty(s3, "--rate", "0.05", "--seed", str(seed)) as bucket:
            place = Place(folder, s3, "spoilt", port=bucket.port, captioner=captioner)
            done = capstan(stage, str(place.recipe()), "--set", "resources.cpus=2", env=env)
            assert done.returncode == 0, done.stderr
        total += bucket.injected
        counts = "".join(f"{bucket.counts.get(kind, 0):>14}" for kind in FAULTS)
        lost = abs(kept(place) - kept(sound))
        table.append(f"{stage:<12}{bucket.counts['requests']:>10}{counts}{bucket.injected:>10}{lost:>6}")
        assert bucket.injected >= 3, "too few requests for the rate"
    with capsys.disabled():
        print("\n".join(table))
    assert_like(place, sound)
    assert total >= 30
