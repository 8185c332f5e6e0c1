"""A soak: build, score, recaption and encode on a Ray cluster of several nodes, with nodes and drivers lost on the way.

    python benchmarks/soak.py [--units 200] [--workers 4] [--rows 4] [--sleep 0.2]

Nodes are process trees of this machine: a head that runs no work, and workers of one CPU each. Models sleep. In every
stage the driver is killed after an eighth of the units, and the same command is run again; later one node is killed,
with all that runs on it, and another one comes. At the end every file that users rely on is compared with that of an
untouched run on this machine without Ray. The memory of each stage's last driver is noted whenever units of the stage's
job end: its mean over each quarter of them says whether it grows.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from capstan.cluster.local_cluster import Nodes
from capstan.pipeline import build
from capstan.pipeline.config import Recipe
from capstan.pipeline.score import registry
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog
from capstan.pipeline.units.on_ray import RayWorkers
from capstan.pipeline.units.workers import Ended

SLEEP = "CAPSTAN_SOAK_SLEEP_S"  # see soak_models
STAGES = {"build": "ingest-", "score": "score", "recaption": "recaption-", "encode": "latents-"}  # and their markers
COMPARED = ("shards/", "ledger/", "scores/", "captions/", "latents/")
SEEN_SOON = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
PATHS = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]


def jpeg(number: int) -> bytes:
    """Return a drawn image unlike those of other numbers."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST).save(file, "JPEG")
    return file.getvalue()


def recipe_of(folder: Path, name: str, rows: int, executor: str = "auto") -> Path:
    """Write the recipe of the dataset `name`, with `rows` rows in a unit and in a shard."""
    content = {
        "dataset": str(folder / name),
        "source": {"path": str(folder / "rows.parquet"), "image": "image"},
        "image": {"size": 16, "min_size": 8},
        "dedup": {"perceptual": None},
        "unit": {"rows": rows},
        "shards": {"samples": rows},
        "resources": {"gpus": 0, "model_workers": 2, "executor": executor},
        "recaption": {"engine": "openai", "model": "sleeping", "server": {"url": "http://127.0.0.1:9/v1"}},
        "train": {"model": "soak_models:SleepingFamily", "run": str(folder / "run"), "steps": 1, "batch": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# The driver, a process of its own ------------------------------------------------------------------------------------


class Memory:
    """This process's memory while units of the jobs whose names begin with `prefix` end on Ray."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._seen: list[tuple[int, int]] = []  # units that have ended, and bytes
        self._process, self._stream = psutil.Process(), RayWorkers.stream
        RayWorkers.stream = self._watched(self._stream)  # type: ignore[method-assign]

    def _watched(self, stream: Any) -> Any:
        def watched(workers: RayWorkers, units: Sequence[Any]) -> Iterator[list[Ended]]:
            for ended in stream(workers, units):
                yield ended
                if workers.job.name.startswith(self._prefix):
                    count = self._seen[-1][0] if self._seen else 0
                    self._seen.append((count + len(ended), self._process.memory_info().rss))

        return watched

    def costs(self) -> dict[str, float]:
        """Return the number of units, and the mean memory (MiB) over each quarter of them."""
        seen = [(count, size) for count, size in self._seen if count]
        units = seen[-1][0] if seen else 0
        quarters = [[size for count, size in seen if 4 * (count - 1) // units == n] for n in range(4)]
        return {"units": units, **{f"quarter {n + 1}": sum(q) / len(q) / 2**20 for n, q in enumerate(quarters) if q}}


def drive(stage: str, path: str) -> None:
    """Run a stage with models that sleep; print what it cost."""
    recipe, memory = Recipe.model_validate(yaml.safe_load(Path(path).read_text())), Memory(STAGES[stage])
    if stage == "build":
        build.build(recipe, progress=False)
    elif stage == "score":
        from soak_models import SleepingScorer

        registry.scorers = lambda _: [SleepingScorer()]  # type: ignore[assignment, list-item]
        registry.columns = lambda _: {"sleeping": SleepingScorer.columns}  # type: ignore[assignment]
        build.score(recipe, progress=False)
    elif stage == "recaption":
        from soak_models import SleepingEngine

        from capstan.recaption import job

        job.make = lambda *_, **__: SleepingEngine()
        job.recaption(recipe, progress=False)
    else:
        from capstan.training.encode import encode

        encode(recipe, progress=False)
    print(json.dumps(memory.costs()))


# The soak ------------------------------------------------------------------------------------------------------------


class Soak:
    """One cluster, and one dataset that is made on it."""

    def __init__(self, folder: Path, workers: int, sleep_s: float) -> None:
        self.folder, self.nodes = folder, Nodes(folder / "ray")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env = kept | {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1", SLEEP: str(sleep_s)}
        self.nodes.start_head(env=self.env | SEEN_SOON)
        self.workers = [self._start() for _ in range(workers)]

    def _start(self) -> subprocess.Popen[bytes]:
        return self.nodes.start_worker(cpus=1, env=self.env | SEEN_SOON)

    def replace(self) -> None:
        """Kill the oldest node, and add another."""
        self.nodes.kill(self.workers.pop(0))
        self.workers.append(self._start())

    def run(self, stage: str, recipe: Path, units: int) -> dict[str, float]:
        """Run a stage; lose the driver after an eighth of its units, and a node after half of them."""
        storage, started = Storage(str(recipe.with_suffix(""))), time.perf_counter()
        env = self.env | self.nodes.driver_env()
        driver = start(stage, recipe, env)
        lost = {"nodes": 0, "drivers": 0}
        replacing = threading.Thread(target=self.replace)
        while driver.poll() is None:
            done = committed(storage, STAGES[stage])
            if done >= max(1, units // 8) and not lost["drivers"]:
                lost["drivers"] += 1
                driver.kill()
                driver.wait()
                driver = start(stage, recipe, env)
            if done >= units // 2 and not lost["nodes"]:
                lost["nodes"] += 1
                replacing.start()
            time.sleep(0.2)
        output, _ = driver.communicate()
        if lost["nodes"]:
            replacing.join()
        if driver.returncode:
            sys.exit(f"{stage} ended with {driver.returncode}")
        return {**json.loads(output.splitlines()[-1]), **lost, "s": time.perf_counter() - started}


def start(stage: str, recipe: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", stage, str(recipe)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def committed(storage: Storage, prefix: str) -> int:
    """Return how many units of a stage have a marker."""
    jobs = {name.split("/")[1] for name in storage.names("state") if name.startswith(f"state/{prefix}")}
    return sum(len(MarkerLog(storage, job).read()) for job in jobs)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files that users rely on."""
    storage = Storage(str(folder))
    return {name: storage.read(name) for name in storage.names() if name.startswith(COMPARED)}


def untouched(recipe: Path, env: dict[str, str]) -> None:
    """Run all stages without Ray."""
    for stage in STAGES:
        done = start(stage, recipe, env | {SLEEP: "0"})
        done.communicate()
        assert done.returncode == 0, stage


def soak(units: int, rows: int, workers: int, sleep_s: float) -> tuple[int, list[str]]:
    """Print what each stage cost; return the number of files, and those that differ from the untouched run's."""
    with tempfile.TemporaryDirectory(prefix="capstan-soak-") as name:
        folder = Path(name)
        images = [{"image": jpeg(n), "caption": f"image {n}"} for n in range(units * rows)]
        pq.write_table(pa.Table.from_pylist(images), folder / "rows.parquet")
        touched, sound = recipe_of(folder, "touched", rows), recipe_of(folder, "untouched", rows, "processes")
        cluster = Soak(folder, workers, sleep_s)
        with cluster.nodes, ThreadPoolExecutor() as pool:
            plain = pool.submit(untouched, sound, cluster.env)
            for stage in STAGES:
                show(stage, cluster.run(stage, touched, units))
            plain.result()
        ours, theirs = contents(folder / "touched"), contents(folder / "untouched")
        assert len(theirs) > 5 * units, f"too few files: {len(theirs)}"
        differing = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        return len(theirs), differing


def show(stage: str, one: dict[str, float]) -> None:
    """Print a line of the table."""
    quarters = ", ".join(f"{value:.1f}" for name, value in one.items() if name.startswith("quarter"))
    costs = f"{one['s']:.0f} | {one['units']:.0f} | {quarters}"
    print(f"| {stage} | {one['nodes']} | {one['drivers']} | {costs} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=200, help="units of each stage (default: 200)")
    parser.add_argument("--workers", type=int, default=4, help="nodes besides the head (default: 4)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a unit and of a shard (default: 4)")
    parser.add_argument("--sleep", type=float, default=0.2, metavar="S", help="seconds of a model's batch")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        drive(*arguments.child)
        return
    print("| stage | nodes lost | drivers killed | seconds | last driver: units | its memory by quarter of them, MiB |")
    print("|---|---|---|---|---|---|", flush=True)
    files, differing = soak(arguments.units, arguments.rows, arguments.workers, arguments.sleep)
    print(f"\n{files:,} files, of which {len(differing)} differ from the untouched run's")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
