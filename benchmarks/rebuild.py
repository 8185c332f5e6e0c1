"""The time of `capstan build` when nothing is left to do: a finished dataset of many units, on disk and in a bucket.

    python benchmarks/rebuild.py [--units 10000] [--runs 3] [--folder DIR] [--no-bucket]

The dataset is a real one with one row per unit, planned, ingested, selected and packed by the code of `build`. Only
Ray is left out of ingesting, since its overhead would take a quarter of an hour: `prepare`, `commit` and `mark` are
called in a pool of processes. The following `build` finds all units committed, selects and packs. The bucket is the
same folder behind `rclone serve s3`.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from capstan.pipeline.config import Recipe
from capstan.pipeline.ingest.job import Ingest
from capstan.pipeline.source.plan import plan
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Unit

KEYS = {"key": "capstan-key", "secret": "capstan-secret"}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--units", type=int, default=10_000)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--folder", type=Path, help="keep the dataset here, and reuse it")
    options.add_argument("--no-bucket", action="store_true")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="capstan-rebuild-") as scratch:
        folder = (chosen.folder or Path(scratch)).resolve()
        recipe = make(folder, chosen.units)
        print(f"{chosen.units:,} units; medians of {chosen.runs} runs of `capstan build` as a process of its own\n")
        print(f"{'where':<12}{'whole process':>14}{'build()':>9}{'plan':>7}{'ingest':>8}   (seconds)")
        show("local disk", [rebuild(recipe, folder) for _ in range(chosen.runs)])
        if not chosen.no_bucket:
            with bucket(folder) as storage:
                there = {**recipe, "dataset": "s3://bucket/dataset", "storage": storage}
                show("bucket", [rebuild(there, folder) for _ in range(chosen.runs)])


def make(folder: Path, units: int) -> dict[str, Any]:
    """Make a finished dataset of `units` units below `folder`, unless it exists; return its recipe."""
    dataset = folder / "bucket" / "dataset"
    recipe = {
        "dataset": str(dataset),
        "source": {"path": str(folder / "rows.parquet"), "image": "image"},
        "image": {"size": 32, "min_size": 8},
        "dedup": {"perceptual": None},
        "unit": {"rows": 1},
        "resources": {"cpus": 2},
    }
    if (dataset / "dataset.json").exists():
        return recipe
    dataset.mkdir(parents=True)
    rows = [{"image": image(number), "caption": f"image {number}"} for number in range(units)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    valid = Recipe.model_validate(recipe)
    job = Ingest(valid, Storage(valid.dataset))
    planned = Ingest.units(plan(valid, job.storage, progress=False).units)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=_set, initargs=(job,)) as pool:
        list(pool.map(_ingest, planned, chunksize=64))
    seconds = rebuild(recipe, folder)["seconds"]
    print(f"made: {json.dumps(seconds)}", file=sys.stderr)
    return recipe


def image(number: int) -> bytes:
    colours = np.random.default_rng(number).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.kron(colours, np.ones((8, 8, 1), np.uint8))).save(file, "JPEG")
    return file.getvalue()


def _set(job: Ingest) -> None:
    global _job
    _job = job


def _ingest(unit: Unit) -> None:
    """Do what the unit map does with a unit, without Ray."""
    _job.markers.mark(unit.id, _job.commit(unit, list(_job.prepare(unit))))


def rebuild(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run `capstan build`; return its summary, and the seconds of the `process`."""
    file = folder / "recipe.json"  # JSON is YAML
    file.write_text(json.dumps(recipe))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "capstan", "build", str(file), "--json"], stdout=subprocess.PIPE, check=True
    )
    return {"process": time.monotonic() - start, **json.loads(done.stdout.splitlines()[-1])}


def show(where: str, runs: list[dict[str, Any]]) -> None:
    def median(values: Iterator[float]) -> float:
        return statistics.median(values)

    process = median(run["process"] for run in runs)
    build = median(sum(run["seconds"].values()) for run in runs)
    laps = {name: median(run["seconds"].get(name, 0.0) for run in runs) for name in ("plan", "ingest")}
    print(f"{where:<12}{process:>14.2f}{build:>9.2f}{laps['plan']:>7.2f}{laps['ingest']:>8.2f}", flush=True)


@contextmanager
def bucket(folder: Path) -> Iterator[dict[str, Any]]:
    """Serve `folder` by a real S3 server on loopback; yield the recipe's `storage`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = str(Path(sys.executable).with_name("rclone"))
    keys = f"{KEYS['key']},{KEYS['secret']}"
    server = subprocess.Popen(
        [program, "serve", "s3", "--auth-key", keys, "--addr", address, str(folder)], stderr=subprocess.DEVNULL
    )
    try:
        storage = {**KEYS, "endpoint_url": f"http://{address}"}
        Storage("s3://bucket/dataset", storage).exists("dataset.json")  # retries until the server is up
        yield storage
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
