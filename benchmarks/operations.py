"""Laws of the control plane in operations on storage: what a change costs, by the size of what is there.

    takedown    one key, one URL: at 20, 80 and 240 units

    python benchmarks/operations.py [takedown] [--units 20 80 240]

Counts are exact and need no quiet machine. Units have 4 rows and run in this process, so that what workers do is
counted, too. A read, a write, a removal and a look-up count as one operation, opening a file to read parts of it as
three, a listing as one per 1,000 names.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from capstan.pipeline import build, units
from capstan.pipeline.config import Blocklist, Recipe
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import Local
from capstan.pipeline.units.workers import Ended, Prepare, commits

ROWS = 4  # per unit
SIZES = [20, 80, 240]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="takedown (default: all)")
    parser.add_argument("--units", type=int, nargs="+", default=SIZES, help="sizes (default: 20 80 240)")
    arguments = parser.parse_args()
    units.ProcessWorkers = Here  # type: ignore[misc, assignment]
    units.SMALL_RUN = 10**9  # type: ignore[misc]
    parts = arguments.parts or ["takedown"]
    if "takedown" in parts:
        print("| units | operations: one key removed | one URL |\n|---|---|---|")
        for number in arguments.units:
            found = of_takedown(number)
            print(f"| {number} | {found['keys']:,} | {found['urls']:,} |", flush=True)


if __name__ == "__main__":
    main()
