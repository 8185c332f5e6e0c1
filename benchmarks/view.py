"""`capstan view` of large ledgers: seconds of each question from a sample, after the index is built, and to build it.

    python benchmarks/view.py [--rows 1500000,2500000,5000000] [--work FOLDER]

Writes ledgers as a build leaves them (random keys in order, hashes, captions of about 60 characters, one score), once
for each number of rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from capstan.pipeline.dataset.shards import LedgerEntry, Manifest, sha256_of, write_manifest
from capstan.pipeline.records import LEDGER_SCHEMA
from capstan.pipeline.report.explore import Explorer
from capstan.pipeline.report.query import Rows
from capstan.pipeline.storage import Storage, parquet_bytes

UNIT_ROWS = 10_000
GRID = ("caption",)  # texts that a grid of images shows
SCHEMA = LEDGER_SCHEMA.append(pa.field("clip_score", pa.float32()))
FUNNEL = [
    ("size", "least(original_width, original_height) >= 400"),
    ("match", "clip_score >= 0.28"),
    ("small", "bytes < 90000"),
]
WORDS = np.array(
    ["a", "red", "bird", "on", "the", "old", "stone", "wall", "by", "sea", "in", "light", "of", "two", "boats"]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1500000,2500000,5000000")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "capstan-bench-view")
    arguments = parser.parse_args()
    for rows in map(int, arguments.rows.split(",")):
        folder = arguments.work.resolve() / str(rows)
        if not (folder / "dataset.json").exists():
            write(Storage(str(folder)), rows)
        measure(Storage(str(folder)), rows, folder / "cache")


def write(storage: Storage, rows: int) -> None:
    """Write a ledger of rows whose keys rise from unit to unit, and its manifest."""
    random, entries = np.random.default_rng(0), []
    units = -(-rows // UNIT_ROWS)
    for number in range(units):
        data = parquet_bytes(unit(random, number, units, min(UNIT_ROWS, rows - number * UNIT_ROWS)))
        name = f"unit-0000-{number:06d}"
        storage.write(f"ledger/{name}.parquet", data)
        entries.append(LedgerEntry(name=name, rows=min(UNIT_ROWS, rows - number * UNIT_ROWS), sha256=sha256_of(data)))
    write_manifest(storage, Manifest(ledger=entries, counts={"rows": rows}))


def unit(random: np.random.Generator, number: int, units: int, rows: int) -> pa.Table:
    places = (number + np.sort(random.random(rows))) / units
    outcome = random.choice(["kept", "rejected", "failed"], rows, p=[0.6, 0.3, 0.1])
    texts = [" ".join(line) for line in WORDS[random.integers(0, len(WORDS), (rows, 12))]]
    sides = random.integers(100, 3000, (2, rows), dtype=np.int32)
    columns = {
        "key": [f"{int(place * 2**64):016x}{index:016x}" for index, place in enumerate(places)],
        "url": [f"https://images.example/{int(n):x}.jpg" for n in random.integers(0, 2**60, rows)],
        "caption": texts,
        "outcome": outcome,
        "reason": np.select([outcome == "rejected", outcome == "failed"], ["size", "timeout"], ""),
        "detail": [""] * rows,
        "sha256": [random.bytes(32).hex() for _ in range(rows)],
        "phash": random.integers(0, 2**63, rows, dtype=np.uint64),
        "colours": [random.bytes(48).hex()[:64] for _ in range(rows)],
        "extra": ["{}"] * rows,
        "unit": [f"0000-{number:06d}"] * rows,
        "shard": [""] * rows,
        "bytes": random.integers(5_000, 400_000, rows),
        "clip_score": random.normal(0.28, 0.05, rows).astype(np.float32),
    }
    sizes = dict.fromkeys(("width", "height"), np.full(rows, 256, np.int32))
    sizes |= dict(zip(("original_width", "original_height"), sides, strict=True))
    sizes |= dict.fromkeys(("crop_left", "crop_top"), np.zeros(rows, np.int32))
    whole = columns | sizes
    return pa.table([pa.array(whole[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def measure(storage: Storage, rows: int, cache: Path) -> None:
    for file in cache.glob("*"):
        file.unlink()
    started = time.perf_counter()
    with Rows(storage) as opened:
        explorer = Explorer(opened, cache=cache)
        facets = explorer.outcomes
        print(f"\n{rows:,} rows: start {time.perf_counter() - started:.2f} s, {len(facets)} facets")
        ask(explorer, "from a sample")
        started, used = time.perf_counter(), time.process_time()
        explorer.prepare()
        size = sum(file.stat().st_size for file in cache.glob("*")) / 1e6
        ledger = sum(storage.size(name) for name in storage.names("ledger")) / 1e6
        taken = f"{time.perf_counter() - started:.1f} s, {time.process_time() - used:.1f} CPU s"
        print(f"  index: {taken}, {size:,.0f} MB of a ledger of {ledger:,.0f} MB")
        ask(explorer, "from the index")
        explorer.close()


def ask(explorer: Explorer, title: str) -> None:
    key = explorer.page(limit=60).rows[-1].key
    deep = ["", "8" * 32]
    questions: dict[str, Callable[[], object]] = {
        "facets": lambda: explorer.outcomes,
        "page of 60": lambda: explorer.page(limit=60),
        "page of 60, in the middle": lambda: explorer.page(limit=60, after=deep),
        "page of 60, by score": lambda: explorer.page(limit=60, order="clip_score", descending=True, texts=GRID),
        "page of 60, filtered": lambda: explorer.page(where="clip_score > 0.3 AND width = 256", limit=60),
        "funnel of 3 thresholds": lambda: explorer.funnel(FUNNEL),
        "histogram": lambda: explorer.histogram("clip_score"),
        "nearest 12 to a threshold": lambda: explorer.nearest("clip_score", 0.28),
        "one key": lambda: explorer.detail(key),
    }
    for name, question in questions.items():
        seconds, cpu = [], []
        for _ in range(6):
            started, used = time.perf_counter(), time.process_time()
            question()
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
        middle, work = (statistics.median(values[1:]) for values in (seconds, cpu))
        print(f"  {title}: {name}: {middle:.3f} s, {work:.3f} CPU s (least {min(seconds):.3f}, first {seconds[0]:.2f})")


if __name__ == "__main__":
    main()
