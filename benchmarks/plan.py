"""Planning a large table: rows/s, and the memory of all processes together.

    python benchmarks/plan.py [--rows 10000000]

Writes Parquet tables of (url, caption, two more columns), 20 of equal size, to a temporary folder and plans them in a
process of its own; then again unchanged; with 1% of new rows in a table of their own; and with as many more in the last
of the tables, which is written again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

CHUNK = 250_000
TABLES = 20
MIB = 1 << 20
PLAN = """
import json, sys, time
from capstan.pipeline.config import Recipe
from capstan.pipeline.source.plan import plan
from capstan.pipeline.storage import Storage
recipe = Recipe.model_validate({"dataset": sys.argv[2], "source": {"path": sys.argv[1]}})
start = time.monotonic()
made = plan(recipe, Storage(recipe.dataset), progress=False)
batches = [sum(u.rows for u in made.units if u.batch == b) for b in sorted({u.batch for u in made.units})]
print(json.dumps({"seconds": time.monotonic() - start, "cpu": time.process_time(), "batches": batches}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory(prefix="capstan-bench-plan-") as folder:
        tables, dataset = Path(folder) / "rows", Path(folder) / "dataset"
        tables.mkdir()
        for number in range(TABLES):
            write_table(tables / f"{number:02}.parquet", rows * number // TABLES, rows * (number + 1) // TABLES)
        idle = peak_of(["-c", "import capstan.pipeline.source.plan"])[1]
        size = sum(table.stat().st_size for table in tables.iterdir())
        print(f"tables: {rows:,} rows, {size / MIB:,.0f} MiB; an idle process: {idle:,.0f} MiB")
        print(f"{'':<22}{'rows':>12}{'seconds':>10}{'CPU s':>8}{'rows/s':>14}{'peak MiB':>10}  batches")
        measure("planned", rows, tables, dataset)
        measure("again, unchanged", rows, tables, dataset)
        grown = rows + max(1, rows // 100)
        write_table(tables / f"{TABLES:02}.parquet", rows, grown)
        measure("1% in a new table", grown, tables, dataset)
        more = grown + max(1, rows // 100)
        write_table(tables / f"{TABLES:02}.parquet", rows, more)
        measure("1% in a changed one", more, tables, dataset)


def measure(what: str, rows: int, tables: Path, dataset: Path) -> None:
    """Plan in a child process and print a line."""
    out, peak = peak_of(["-c", PLAN, str(tables), str(dataset)])
    found = json.loads(out.splitlines()[-1])
    seconds = f"{found['seconds']:>10.2f}{found['cpu']:>8.1f}{rows / found['seconds']:>14,.0f}"
    print(f"{what:<22}{rows:>12,}{seconds}{peak:>10,.0f}  {found['batches']}", flush=True)


def write_table(path: Path, first: int, stop: int) -> None:
    """Write rows [first, stop) like those of large public tables: URLs of about 70 characters, captions of about 60."""
    schema = pa.schema(
        [("url", pa.string()), ("caption", pa.string()), ("width", pa.int32()), ("licence", pa.string())]
    )
    licences = pa.array(["cc0", "cc-by", "cc-by-sa", "unknown"])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(first, stop, CHUNK):
            count = min(CHUNK, stop - start)
            number = pa.array(np.arange(start, start + count)).cast(pa.string())
            url = pc.binary_join_element_wise(
                "https://images", number, ".example.org/photos/2024/large/", number, ".jpg", ""
            )
            caption = pc.binary_join_element_wise(
                "A photograph of number", number, "on a wooden table by the window", " "
            )
            width = pa.array(np.arange(start, start + count, dtype=np.int32) % 4096)
            licence = licences.take(pa.array(np.arange(count) % 4))
            writer.write_table(pa.table([url, caption, width, licence], schema=schema))


def peak_of(arguments: list[str]) -> tuple[str, float]:
    """Run Python; return its stdout, and the peak resident memory of its process tree in MiB."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                tree = [root, *root.children(recursive=True)]
                peak = max(peak, sum(each.memory_info().rss for each in tree) / MIB)
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(process.returncode)
    return out, peak


if __name__ == "__main__":
    main()
