"""Laws of the control plane in operations on storage: what a change costs, by the size of what is there.

    takedown    one key, one URL: at 20, 80 and 240 units
    rows        half a unit of new rows; and another condition, by which rows of 4 units are rejected for another reason
    captions    planning a caption layer at 0.1, 0.4 and 1.6 million images: growth of the driver's memory, and seconds
                until the first shard can start; for a new layer, and for one whose shards were all repacked

    python benchmarks/operations.py [takedown] [rows] [captions] [--units 20 80 240] [--images 100000 400000 1600000]

Counts are exact and need no quiet machine, nor does memory. Units of takedowns have 4 rows and run in this process, so
that what workers do is counted, too. A read, a write, a removal and a look-up count as one operation, opening a file to
read parts of it as three, a listing as one per 1,000 names.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from capstan.pipeline import build, units
from capstan.pipeline.config import Blocklist, Recipe, Resources
from capstan.pipeline.dataset.shards import Dataset, Manifest, ShardEntry, write_manifest
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.pipeline.storage.local import Local
from capstan.pipeline.units.workers import Ended, Prepare, commits
from capstan.recaption import store
from capstan.recaption.planning.existing import Lookup
from capstan.recaption.planning.incomplete import incomplete

ROWS = 4  # per unit
SIZES = [20, 80, 240]
IMAGES = [100_000, 400_000, 1_600_000]
SHARD = 10_000  # images
_COSTS = {"read": 1, "read_range": 1, "exists": 1, "size": 1, "write": 1, "put": 1, "delete": 1, "open": 3}


class Here:
    """The workers of a run, in this process."""

    def __init__(self, job: units.Job, *_: Any) -> None:
        self.job, self._starts = job, Counter[str]()

    def stream(self, work: Sequence[units.Unit]) -> Iterator[list[Ended]]:
        prepare = Prepare(self.job, self, 3)
        yield [ended for unit in work for ended in commits(self.job, [unit], prepare(unit))]

    def start(self, unit: str, item: str) -> int:
        self._starts[item] += 1
        return self._starts[item]

    def starts(self, items: Sequence[str]) -> dict[str, int]:
        return {item: self._starts[item] for item in items}

    def ended(self, *_: object) -> None:
        pass

    add = close = ended

    def reported(self) -> dict[str, float]:
        return {}


class Counted:
    """Counts operations on storage while it is open."""

    def __enter__(self) -> Counter[str]:
        self._before = {name: getattr(Local, name) for name in (*_COSTS, "find")}
        self.counts = Counter[str]()
        for name, method in self._before.items():
            setattr(Local, name, self._counting(name, method))
        return self.counts

    def __exit__(self, *_: object) -> None:
        for name, method in self._before.items():
            setattr(Local, name, method)

    def _counting(self, name: str, method: Any) -> Any:
        def call(files: Local, *arguments: Any, **options: Any) -> Any:
            result = method(files, *arguments, **options)
            self.counts[name] += _COSTS.get(name) or 1 + len(result) // 1000
            return result

        return call


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST).save(file, "JPEG")
    return file.getvalue()


def recipe_for(folder: Path, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "dataset": str(folder / "dataset"),
            "source": {"path": str(folder / "rows*.parquet"), "image": "image"},
            "image": {"size": 16, "min_size": 8},
            "select": [{"name": "wide", "where": "width >= 16"}],
            "dedup": {"perceptual": None},
            "shards": {"samples": 2 * ROWS},
            "unit": {"rows": ROWS},
            "resources": {"executor": "processes"},
            **sections,
        }
    )


def rows(folder: Path, first: int, count: int) -> None:
    """Write a source of `count` rows, each with an image of its own."""
    listed = [
        {"image": jpeg(n), "url": f"https://host{n}.example.org/{n}.jpg", "caption": f"image {n}"}
        for n in range(first, first + count)
    ]
    pq.write_table(pa.Table.from_pylist(listed), folder / f"rows{first:08}.parquet")


def built(folder: Path, number: int) -> Storage:
    """Build a dataset of `number` units."""
    rows(folder, 0, number * ROWS)
    build.build(recipe_for(folder), progress=False)
    return Storage(str(folder / "dataset"))


def of_takedown(number: int) -> dict[str, int]:
    """Return the operations that removing one key, and then one URL, takes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        storage, found = built(folder, number), dict[str, int]()
        ledger = pq.read_table(folder / "dataset" / "ledger", columns=["key", "url"]).to_pylist()
        for kind, entry in (("keys", ledger[5]["key"]), ("urls", ledger[-5]["url"])):
            (folder / "list.txt").write_text(entry + "\n")
            with Counted() as counts:
                removed = build.remove(storage.url, Blocklist(**{kind: str(folder / "list.txt")}), progress=False)
            assert removed["removed"]["rows"] == 1
            found[kind] = counts.total()
        return found


def of_rows(number: int) -> dict[str, int]:
    """Return the operations that half a unit of new rows takes, and those of conditions that decide 4 and 16 rows."""
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), dict[str, int]()
        built(folder, number)
        rows(folder, number * ROWS, ROWS // 2)
        with Counted() as counts:
            summary = build.build(recipe_for(folder), progress=False)
        assert summary["counts"]["kept"] == number * ROWS + ROWS // 2
        found["new"] = counts.total()
        for rejected in (4, 16):
            for named in ("one", "other"):
                places = range(rejected)
                few = " AND ".join(f"url <> 'https://host{place}.example.org/{place}.jpg'" for place in places)
                select = [{"name": f"{named}{rejected}", "where": few}]
                with Counted() as counts:
                    summary = build.build(recipe_for(folder, select=select), progress=False)
                assert summary["counts"]["rejected"] == rejected
            found[f"condition{rejected}"] = counts.total()
            found[f"read{rejected}"] = counts["read"] + counts["open"]
        return found


def write_captioned(storage: Storage, shards: int) -> None:
    """Write tables of shards with 10,000 images each, and captions of all images in files that no shard owns."""
    entries = []
    for number in range(shards):
        random = np.random.default_rng(number)
        sums = [random.bytes(32).hex() for _ in range(SHARD)]
        name, text = f"shard-{number:06d}", [""] * SHARD
        data = parquet_bytes(pa.table({"key": [digits[:32] for digits in sums], "sha256": sums, "caption": text}))
        storage.write(f"shards/{name}.parquet", data)
        sizes = {"samples": SHARD, "bytes": 1 << 30, "sha256": sums[0], "table_sha256": ""}
        entries.append(ShardEntry(name=name, **sizes))
        rows = [store.Row("a cat", "a cat", 3, "end", 0, ()) for _ in sums]
        places = [store.Place(digits[:32], digits, "", "descriptive") for digits in sums]
        store.write_rows(storage, f"captions/moved/former-{number:06d}.parquet", zip(places, rows, strict=True))
    write_manifest(storage, Manifest(shards=entries, recipe={"dedup": {"exact": True}}))


def of_captions(count: int, layer: str) -> dict[str, float]:
    """Return the growth of the driver's memory in MiB, and the seconds, until the shards' units are known."""
    with tempfile.TemporaryDirectory() as folder:
        storage, process = Storage(folder), psutil.Process()
        resources = Resources(executor="processes", cpus=2)
        write_captioned(storage, 2)
        planned(Dataset(storage), layer, resources)  # so that all is loaded
        write_captioned(storage, count // SHARD)
        pa.default_memory_pool().release_unused()
        gc.collect()
        before, start = process.memory_info().rss, time.perf_counter()
        peak = [before]
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.05):
                peak[0] = max(peak[0], process.memory_info().rss)

        threading.Thread(target=watch, daemon=True).start()
        planned(Dataset(storage), layer, resources)
        ended.set()
        return {"mib": (peak[0] - before) / 2**20, "s": time.perf_counter() - start}


def planned(dataset: Dataset, layer: str, resources: Resources) -> None:
    """Look up the captions of a layer that has none of the present shards."""
    todo = incomplete(dataset, layer, {})
    if todo.scattered:
        sources = (todo.entries, todo.captions, [])
        lookup = Lookup(dataset, layer, ("descriptive",), False, *sources, dataset.storage, resources, progress=False)
        saved = lookup.save(lookup.find(sharing=True))
        assert sum(facts["rows"] for facts in saved) == sum(entry.samples for entry in dataset.manifest.shards)
        lookup.clean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="takedown, rows, captions (default: all)")
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, help="sizes of a captioned dataset")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--units", type=int, nargs="+", default=SIZES, help="sizes (default: 20 80 240)")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(of_captions(int(arguments.child[0]), arguments.child[1])))
        return
    parts = arguments.parts or ["takedown", "rows", "captions"]
    if "captions" in parts:
        print("| images | layer | driver + MiB | s |\n|---|---|---|---|")
        for count in arguments.images:
            for layer in ("new", "moved"):
                command = [sys.executable, __file__, "--child", str(count), layer]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                print(f"| {count:,} | {layer} | {found['mib']:.0f} | {found['s']:.1f} |", flush=True)
        print()
    units.ProcessWorkers = Here  # type: ignore[misc, assignment]
    units.SMALL_RUN = 10**9  # type: ignore[misc]
    if "takedown" in parts:
        print("| units | operations: one key removed | one URL |\n|---|---|---|")
        for number in arguments.units:
            found = of_takedown(number)
            print(f"| {number} | {found['keys']:,} | {found['urls']:,} |", flush=True)
    if "rows" in parts:
        print("\n| units | operations: half a unit of new rows | 4 other rows rejected | reads | 16 | reads |")
        print("|---|---|---|---|---|---|")
        for number in arguments.units:
            found = of_rows(number)
            figures = [found[name] for name in ("new", "condition4", "read4", "condition16", "read16")]
            print(f"| {number} | " + " | ".join(f"{count:,}" for count in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
