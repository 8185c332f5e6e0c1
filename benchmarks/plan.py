"""Planning a large table: CPU seconds and memory of all processes together, in one process and on workers.

    python benchmarks/plan.py [--rows 10000000] [--workers 0,1,2] [--tiny] [--executor processes]

Writes Parquet tables of (url, caption, two more columns), of at most 500,000 rows, to a temporary folder, and plans
them in a process of their own for each number of workers (0: in that process); all plans must be the same. The first
is planned again unchanged; with 1% of new rows in a table of their own; and with as many more in the last of the
tables, which is written again. `--tiny`: short URLs alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

CHUNK = 250_000
TABLES, TABLE_ROWS = 20, 500_000
MIB = 1 << 20
SCRATCH_EVERY_S = 0.5
PLAN = """
import json, sys, time
from capstan.pipeline.config import Recipe
from capstan.pipeline.source import plan as planning, plan_on_workers
from capstan.pipeline.source.plan import plan
from capstan.pipeline.storage import Storage
source, dataset, workers, executor = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
if workers:
    plan_on_workers.SMALL_ROWS = 0
else:
    planning.on_workers = lambda parts: False
resources = {"executor": executor, "cpus": max(1, workers)}
recipe = Recipe.model_validate({"dataset": dataset, "source": {"path": source}, "resources": resources})
start = time.monotonic()
made = plan(recipe, Storage(recipe.dataset), progress=False)
batches = [sum(u.rows for u in made.units if u.batch == b) for b in sorted({u.batch for u in made.units})]
print(json.dumps({"seconds": time.monotonic() - start, "cpu": time.process_time(), "batches": batches}))
"""


@dataclass
class Peaks:
    """The most that a process tree took: memory (bytes), of all and of the first; temporary files; and CPU seconds."""

    memory: int = 0
    driver: int = 0
    scratch: int = 0
    cpu: dict[int, float] = field(default_factory=dict)  # by process

    def note(self, root: psutil.Process) -> None:
        tree = [root, *root.children(recursive=True)]
        memory = []
        for each in tree:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                memory.append(each.memory_info().rss)
                times = each.cpu_times()
                self.cpu[each.pid] = times.user + times.system
        self.memory = max(self.memory, sum(memory))
        self.driver = max(self.driver, memory[0] if memory else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--executor", default="processes", choices=["auto", "processes", "ray"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--first-only", action="store_true", help="no second plans")
    parser.add_argument("--folder", help="folder for temporary files")
    options = parser.parse_args()
    rows, workers = options.rows, [int(number) for number in options.workers.split(",")]
    with tempfile.TemporaryDirectory(prefix="capstan-bench-plan-", dir=options.folder) as name:
        folder = Path(name)
        tables = folder / "rows"
        tables.mkdir()
        count = max(TABLES, rows // TABLE_ROWS)
        for number in range(count):
            bounds = rows * number // count, rows * (number + 1) // count
            write_table(tables / f"{number:04}.parquet", *bounds, tiny=options.tiny)
        size = sum(table.stat().st_size for table in tables.iterdir())
        print(f"tables: {count} of {rows:,} rows, {size / MIB:,.0f} MiB; CPU s and MiB: of all processes (the driver)")
        print(f"{'':<22}{'rows':>12}{'seconds':>9}{'CPU s':>16}{'peak MiB':>14}{'scratch B/row':>14}  batches")
        measured = Measured(folder, tables, options.executor)
        sums = set()
        for number in workers:
            measured.plan(f"{number} workers" if number else "one process", rows, number)
            sums.add(measured.plan_sum(number))
            if number != workers[0]:
                shutil.rmtree(measured.dataset(number))
        print("the plans are the same" if len(sums) == 1 else "THE PLANS DIFFER")
        if not options.first_only:
            again(measured, rows, workers[0])


def again(measured: Measured, rows: int, workers: int) -> None:
    """Plan the same dataset again, with more and more rows."""
    measured.plan("again, unchanged", rows, workers)
    more = max(1, rows // 100)
    write_table(measured.tables / "more.parquet", rows, rows + more)
    measured.plan("1% in a new table", rows + more, workers)
    write_table(measured.tables / "more.parquet", rows, rows + 2 * more)
    measured.plan("1% in a changed one", rows + 2 * more, workers)


@dataclass
class Measured:
    """Plans that are measured: each in a process of its own, with a dataset and temporary files in `folder`."""

    folder: Path
    tables: Path
    executor: str

    def dataset(self, workers: int) -> Path:
        return self.folder / f"dataset-{workers}"

    def plan(self, what: str, rows: int, workers: int) -> None:
        """Plan in a child process and print a line."""
        scratch = self.folder / "tmp"
        scratch.mkdir(exist_ok=True)
        dataset = self.dataset(workers)
        arguments = [str(self.tables), str(dataset), str(workers), self.executor]
        out, peaks = peaks_of(["-c", PLAN, *arguments], [scratch, dataset / "state/planning"])
        found = json.loads(out.splitlines()[-1])
        cpu = f"{sum(peaks.cpu.values()):,.1f} ({found['cpu']:,.1f})"
        memory = f"{peaks.memory / MIB:,.0f} ({peaks.driver / MIB:,.0f})"
        line = f"{what:<22}{rows:>12,}{found['seconds']:>9.1f}{cpu:>16}{memory:>14}{peaks.scratch / rows:>14.0f}"
        print(f"{line}  {found['batches']}", flush=True)

    def plan_sum(self, workers: int) -> str:
        """Return a hash of all files of a plan."""
        digest, plan = hashlib.sha256(), self.dataset(workers) / "state/plan"
        for path in sorted(plan.rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(plan)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return digest.hexdigest()


def write_table(path: Path, first: int, stop: int, *, tiny: bool = False) -> None:
    """Write rows [first, stop) like those of large public tables: URLs of about 70 characters, captions of about 60."""
    schema = pa.schema(
        [("url", pa.string()), ("caption", pa.string()), ("width", pa.int32()), ("licence", pa.string())]
    )
    if tiny:
        schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    licences = pa.array(["cc0", "cc-by", "cc-by-sa", "unknown"])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(first, stop, CHUNK):
            count = min(CHUNK, stop - start)
            number = pa.array(np.arange(start, start + count)).cast(pa.string())
            if tiny:
                url = pc.binary_join_element_wise("http://a.org/", number, "")
                writer.write_table(pa.table([url, pa.repeat("", count)], schema=schema))
                continue
            url = pc.binary_join_element_wise(
                "https://images", number, ".example.org/photos/2024/large/", number, ".jpg", ""
            )
            caption = pc.binary_join_element_wise(
                "A photograph of number", number, "on a wooden table by the window", " "
            )
            width = pa.array(np.arange(start, start + count, dtype=np.int32) % 4096)
            licence = licences.take(pa.array(np.arange(count) % 4))
            writer.write_table(pa.table([url, caption, width, licence], schema=schema))


def peaks_of(arguments: list[str], folders: list[Path]) -> tuple[str, Peaks]:
    """Run Python; return its stdout, and what it took: `folders` hold temporary files, of which the first is TMPDIR."""
    environment = {"TMPDIR": str(folders[0])}
    command = ["env", *(f"{name}={value}" for name, value in environment.items()), sys.executable, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = Peaks()

    def watch() -> None:
        root, looked = psutil.Process(process.pid), 0.0
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peaks.note(root)
            if time.monotonic() - looked > SCRATCH_EVERY_S:
                peaks.scratch, looked = max(peaks.scratch, bytes_in(folders)), time.monotonic()
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(process.returncode)
    return out, peaks


def bytes_in(folders: list[Path]) -> int:
    total = 0
    for folder in folders:
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


if __name__ == "__main__":
    main()
