"""Seconds of verify, remove, captions export and reading for a selection by the number of workers, on slow storage.

    python benchmarks/slots.py [--units 96] [--slots 2 4 8 16] [--sleep 0.3]

Every read, write and look-up of a file by a worker takes `--sleep` seconds more, so that figures are those of a slow
bucket and hold on a machine with few cores. The driver's operations do not sleep; they are counted. Workers are
processes of this machine, started before the clock. One row of each unit is removed; what is timed ends before shards
are packed again, which is the job of packing. A worker that reads for a selection does so in four threads.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
from operations import ROWS, built, recipe_for

from capstan.pipeline import build, config, units
from capstan.pipeline.config import Resources
from capstan.pipeline.pack import named_rows, scrub, scrub_units
from capstan.pipeline.pack.takedown import take_down
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.select import evaluate
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Unit
from capstan.recaption import store
from capstan.recaption.export import export

_SLOW = ("exists", "size", "read", "read_range", "open", "write", "put")


class Sleeping(Storage):
    """A storage whose operations take `sleep_s` more, but in the driver, where they are counted in `counts`."""

    sleep_s, driver = 0.0, 0
    counts: ClassVar = Counter[str]()

    def __reduce__(self) -> tuple[Any, ...]:
        return sleeping, (self.url, self.sleep_s, self.driver)


def _slow(name: str) -> Callable[..., Any]:
    def method(self: Sleeping, *arguments: Any, **options: Any) -> Any:
        if os.getpid() == self.driver:
            Sleeping.counts[name] += 1
        else:
            time.sleep(self.sleep_s)
        return getattr(Storage, name)(self, *arguments, **options)

    return method


for _name in _SLOW:
    setattr(Sleeping, _name, _slow(_name))


def sleeping(url: str, sleep_s: float, driver: int) -> Sleeping:
    storage = Sleeping(url)
    storage.sleep_s, storage.driver = sleep_s, driver
    return storage


class Warm(Job):
    """Units that keep a worker for a moment, so that all workers are there."""

    name = "warm"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        time.sleep(1)
        yield {}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        return {}


def cost(act: Callable[[], object]) -> str:
    """Return seconds, and the driver's operations, as text."""
    Sleeping.counts.clear()
    start = time.perf_counter()
    act()
    return f"{time.perf_counter() - start:.1f} ({Sleeping.counts.total()})"


def measured(made: Storage, slots: int, sleep_s: float, folder: Path) -> dict[str, str]:
    """Return the cost of each command with this number of workers."""
    resources = Resources(cpus=slots, executor="processes")
    for module in (named_rows, scrub, scrub_units):
        module.Resources = lambda: resources  # type: ignore[attr-defined]
    units.results(Warm(Storage(str(folder / "warm"))), [Unit(str(n)) for n in range(slots)], resources, progress=False)
    shutil.copytree(made.url, folder / "copy", ignore=shutil.ignore_patterns("columns"))  # each unit's tables are read
    slow, target = (sleeping(str(folder / name), sleep_s, os.getpid()) for name in ("copy", "export"))
    recipe = recipe_for(folder.parent).model_copy(update={"dataset": slow.url, "resources": resources})
    staged = build._found(recipe, slow)
    lists = config.Blocklist(keys=str(folder.parent / "keys.txt"))
    found = {
        "verify": cost(lambda: verify(slow, resources=resources)),
        "export": cost(lambda: export(slow, "given", target, slot="descriptive", resources=resources, progress=False)),
        "select": cost(lambda: evaluate.evaluate_conditions(recipe, slow, staged, may_write=True, progress=False)),
        "remove": cost(lambda: take_down(slow, lists, progress=False)),
    }
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=96)
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--sleep", type=float, default=0.3, metavar="S", help="seconds of each operation of a worker")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="capstan-bench-slots-") as name:
        made = built(Path(name), arguments.units)
        ledger = pq.read_table(Path(name) / "dataset" / "ledger", columns=["key"])["key"].to_pylist()
        (Path(name) / "keys.txt").write_text("\n".join(ledger[::ROWS]) + "\n")
        store.write_given_layer(made, "given", {key: {"descriptive": f"a long caption of {key}"} for key in ledger})
        units.SMALL_RUN = evaluate.SMALL_RUN = 0  # type: ignore[misc]
        evaluate._UNIT_ROWS = 2 * ROWS  # type: ignore[misc]
        evaluate._BLOCK_ROWS = ROWS  # type: ignore[misc]
        print("| workers | verify, s (operations of the driver) | captions export | select | remove |")
        print("|---|---|---|---|---|")
        for slots in arguments.slots:
            took = measured(made, slots, arguments.sleep, Path(name) / f"slots-{slots}")
            print(f"| {slots} | " + " | ".join(took.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
