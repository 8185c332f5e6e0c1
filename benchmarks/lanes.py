"""The order in lanes compared with the order without them, on simulated nodes.

    python benchmarks/lanes.py [--only reads|buckets|place|restart|sample|layer]

reads     how often a shard is opened in an epoch, by all nodes together and by each; 320 shards of 64 images. A node
          is one worker, with the data that it opens in a run of that many
buckets   the same with aspect-ratio buckets, of which some are rare; and the tables read before the first sample
place     CPU microseconds to find a sample at 1,000,000,000 of a billion, with the order alone
restart   CPU and wall seconds from the start of a worker of 32 to its first batch at sample 1,000,000,000 of a dataset
          of 100,000 shards, without imports: the manifest is read, one real shard stands under many names
sample    CPU microseconds to find and read a sample, with lanes and without
layer     CPU seconds and bytes to open a shard of 10,000 samples with a caption layer of two slots
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from loader import write_dataset
from PIL import Image

from capstan.pipeline.dataset.ratios import ratios_of
from capstan.pipeline.dataset.shards import Dataset, Manifest, write_manifest
from capstan.pipeline.storage import Storage
from capstan.recaption.store import read_layer, rows_of_shard, write_given_layer
from capstan.training.config import Data
from capstan.training.data import buckets
from capstan.training.data.dataset import TrainingData
from capstan.training.data.lanes import LaneBucketOrder, LaneOrder, sequence
from capstan.training.data.loader import Loader
from capstan.training.data.order import BucketOrder, Order
from capstan.training.data.shard_reader import OpenShard, captions_by_slot

LANES, BATCH = 32, 256
NODES = (1, 2, 4, 8, 16, 32)
SHARDS, ROWS = 320, 64  # of `reads` and `buckets`
SIZES = [(512, 512), (768, 512), (512, 768), (683, 512), (896, 512), (512, 896)]
SHARES = [0.3, 0.3, 0.2, 0.17, 0.02, 0.01]
MANY, EACH, PLACE = 100_000, 10_000, 1_000_000_000
RANK = 5  # of LANES workers, of the one that is restarted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="capstan-bench-lanes-") as folder:
        for part in [arguments.only] if arguments.only else PARTS:
            PARTS[part](Path(folder))


def images(count: int) -> list[bytes]:
    """Return small JPEGs of SIZES divided by 32, with their shares."""
    random = np.random.default_rng(0)
    files = []
    for width, height in SIZES:
        buffer = io.BytesIO()
        Image.new("RGB", (width // 32, height // 32)).save(buffer, format="JPEG")
        files.append(buffer.getvalue())
    return [files[kind] for kind in random.choice(len(SIZES), count, p=SHARES)]


def small_dataset(folder: Path) -> Dataset:
    jpegs = images(SHARDS * ROWS)
    write_dataset(folder, [jpegs[start : start + ROWS] for start in range(0, len(jpegs), ROWS)])
    return with_ratios(Dataset(Storage(str(folder))))


def with_ratios(dataset: Dataset) -> Dataset:
    """Return the dataset with the histograms that `capstan build` puts into the manifest."""
    shards = [e.model_copy(update={"ratios": ratios_of(dataset.table(e.name))}) for e in dataset.manifest.shards]
    return Dataset(dataset.storage, Manifest(shards=shards))


def opens(dataset: Dataset, known: dict[int, OpenShard], lanes: int, nodes: int, **section: Any) -> list[int]:
    """Return how many shards each node opens in an epoch; check that every sample comes once.

    What it opens is taken from `known`, so that a file is read only once for all nodes.
    """
    data = Data.model_validate({"layer": None, **section})
    share, keys, counts = BATCH // nodes, [], []
    for node in range(nodes):
        own = TrainingData(dataset, data, 0, layer=None, batch=BATCH, lanes=lanes, world=nodes)
        opened: list[int] = []
        load = own._open._load

        def counting(number: int, opened: list[int] = opened, load: Callable[[int], Any] = load) -> Any:
            opened.append(number)
            if number not in known:
                known[number] = load(number)
            return known[number]

        own._open._load = counting  # type: ignore[method-assign]
        for step in range(len(own) // BATCH):
            first = step * BATCH + node * share
            keys += [own.at(number).key for number in range(first, first + share)]
        counts.append(len(opened))
    assert data.buckets is not None or len(keys) == len(set(keys)) == SHARDS * ROWS // BATCH * BATCH
    return counts


def reads(folder: Path) -> None:
    dataset, known = small_dataset(folder / "reads"), dict[int, OpenShard]()
    print(f"\nreads: opens of a shard in an epoch of {SHARDS} shards, {LANES} lanes, batches of {BATCH}")
    table(lambda lanes, nodes: opens(dataset, known, lanes, nodes))


def table(measure: Callable[[int, int], list[int]]) -> None:
    print(f"{'nodes':>6}{'no lanes, all nodes':>22}{'each node':>12}{'lanes, all nodes':>20}{'each node':>12}")
    for nodes in NODES:
        without, within = measure(1, nodes), measure(LANES, nodes)
        row = [value / SHARDS for values in (without, within) for value in (sum(values), max(values))]
        print(f"{nodes:>6}{row[0]:>22.2f}{row[1]:>12.3f}{row[2]:>20.2f}{row[3]:>12.3f}", flush=True)


def bucket_reads(folder: Path) -> None:
    dataset, known = small_dataset(folder / "buckets"), dict[int, OpenShard]()
    sizes = {"buckets": {"sizes": [(width // 32, height // 32) for width, height in SIZES]}}
    print(f"\nbuckets: the same with {len(SIZES)} buckets, shares {SHARES}")
    table(lambda lanes, nodes: opens(dataset, known, lanes, nodes, **sizes))
    for name, lanes in (("no lanes", 1), (f"{LANES} lanes", LANES)):
        read: list[str] = []
        shapes = buckets.shapes

        def counting(data: Dataset, shards: Any, read: list[str] = read, shapes: Any = shapes) -> Any:
            read.extend(shards)
            return shapes(data, shards)

        with replaced(counting):
            data = Data.model_validate({"layer": None, **sizes})
            TrainingData(dataset, data, 0, layer=None, batch=BATCH, lanes=lanes, world=LANES)
        print(f"  tables read by each node before the first sample, {name}: {len(read)}")


@contextmanager
def replaced(shapes: Any) -> Iterator[None]:
    from capstan.training.data import dataset

    before = buckets.shapes
    buckets.shapes = dataset.shapes = shapes
    try:
        yield
    finally:
        buckets.shapes = dataset.shapes = before


def place(_: Path) -> None:
    counts = np.full(MANY, EACH)
    kinds = np.random.default_rng(0).choice(len(SIZES), EACH, p=SHARES)
    numbers = np.tile(np.bincount(kinds, minlength=len(SIZES)), (MANY, 1))
    few = MANY // 20  # without lanes every row's bucket is held in memory
    orders = {
        "no lanes": lambda: Order(counts, 8, 0),
        "lanes": lambda: LaneOrder(counts, LANES, 1, 0, BATCH),
        "no lanes, buckets": lambda: BucketOrder(Order(counts[:few], 8, 0), [kinds] * few, len(SIZES), BATCH),
        "lanes, buckets": lambda: LaneBucketOrder(numbers, LANES, 1, 0, BATCH, lambda _: kinds),
    }
    print(f"\nplace: microseconds of CPU a sample, from sample {PLACE:,} on, all lanes and one")
    for name, make in orders.items():
        start = time.process_time()
        order = make()
        order(PLACE)
        ready = time.process_time() - start
        times = []
        for rows in (range(BATCH), range(BATCH // LANES)):
            numbers_read = [PLACE + step * BATCH + row for step in range(100_000 // len(rows)) for row in rows]
            start = time.process_time()
            for number in numbers_read:
                order(number)
            times.append((time.process_time() - start) / len(numbers_read) * 1e6)
        print(f"{name:<20}{times[0]:>8.1f}{times[1]:>8.1f}{ready:>10.2f} s to the first", flush=True)


def restart(folder: Path) -> None:
    """Time a worker's start in a dataset of a billion samples. Of its files only those near the worker's lane exist."""
    data = folder / "restart"
    write_dataset(data, [images(ROWS)], EACH)
    (real,) = with_ratios(Dataset(Storage(str(data)))).manifest.shards
    names = [f"part-{number:06d}" for number in range(MANY)]
    entries = [real.model_copy(update={"name": name, "sha256": f"{number:064x}"}) for number, name in enumerate(names)]
    own = slice(RANK * MANY // LANES - 100, (RANK + 1) * MANY // LANES + 100)
    for number in sequence(MANY, 0)[own]:
        for ending in ("tar", "parquet"):
            os.link(data / "shards" / f"{real.name}.{ending}", data / "shards" / f"{names[number]}.{ending}")
    write_manifest(Storage(str(data)), Manifest(shards=entries))
    size = (data / "dataset.json").stat().st_size
    histograms = sum(len(entry.ratios) for entry in entries)
    print(
        f"\nrestart: {MANY * EACH:,} samples in {MANY:,} shards; a manifest of {size / 1e6:.0f} MB, of which "
        f"{histograms / 1e6:.0f} MB are histograms"
    )
    print(f"{'CPU seconds':<16}{'manifest':>10}{'order':>10}{'first batch':>14}{'all':>8}{'wall s':>8}")
    for name, section in {"lanes": {}, "lanes, buckets": {"buckets": {"sizes": SIZES}}}.items():
        start, times = time.perf_counter(), [time.process_time()]
        dataset = Dataset(Storage(str(data)))
        times.append(time.process_time())
        settings = Data.model_validate({"layer": None, **section})
        samples = TrainingData(dataset, settings, 0, layer=None, batch=BATCH, lanes=LANES, world=LANES)
        times.append(time.process_time())
        first = PLACE // BATCH
        with Loader(samples, lambda _: {}, batch=BATCH, start=first, stop=first + 1, rank=RANK, world=LANES) as loader:
            next(iter(loader))
        times.append(time.process_time())
        parts = "".join(f"{value:>{width}.2f}" for value, width in zip(np.diff(times), (10, 10, 14), strict=True))
        print(f"{name:<16}{parts}{times[-1] - times[0]:>8.2f}{time.perf_counter() - start:>8.2f}", flush=True)


def sample(folder: Path) -> None:
    """Compare the CPU time of whole samples: rounds alternate, and files are open already."""
    dataset, rounds = small_dataset(folder / "sample"), list[tuple[float, ...]]()
    data = Data.model_validate({"layer": None})
    opened = [TrainingData(dataset, data, 0, layer=None, batch=BATCH, lanes=lanes) for lanes in (1, 8)]
    for turn in range(8):
        times = []
        for samples in opened:
            start = time.process_time()
            for number in range(4 * BATCH):
                samples.at(number)
            times.append((time.process_time() - start) / (4 * BATCH) * 1e6)
        rounds += [tuple(times)] * (turn > 0)
    ratios = sorted(lanes / without for without, lanes in rounds)
    print("\nsample: microseconds of CPU to find and read a sample, without decoding: ", end="")
    print(
        f"no lanes {np.median([r[0] for r in rounds]):.0f}, 8 lanes {np.median([r[1] for r in rounds]):.0f}, ", end=""
    )
    print(f"ratio {np.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def layer(folder: Path) -> None:
    write_dataset(folder / "layer", [images(ROWS)], EACH)
    storage = Storage(str(folder / "layer"))
    images_of = Dataset(storage).table("shard-000000", ["key", "sha256"])
    words = "a long description of what is seen in the image " * 6
    texts = {key: {"short": words[:60], "descriptive": words} for key in images_of["key"].to_pylist()}
    write_given_layer(storage, "own", texts)
    keys = pa.concat_arrays(images_of["key"].chunks)
    opened = {
        "by key, as before": lambda: read_layer(storage, "own", "shard-000000", images_of),
        "by column": lambda: captions_by_slot(rows_of_shard(storage, "own", "shard-000000", images_of), keys),
    }
    print(f"\nlayer: opening the captions of {EACH:,} samples, two slots")
    for name, read in opened.items():
        times = []
        for _ in range(7):
            start = time.process_time()
            read()
            times.append(time.process_time() - start)
        tracemalloc.start()
        before, arrow = tracemalloc.get_traced_memory()[0], pa.total_allocated_bytes()
        held = read()
        size = tracemalloc.get_traced_memory()[0] - before + pa.total_allocated_bytes() - arrow
        tracemalloc.stop()
        print(f"{name:<20}{np.median(times):>8.3f} CPU s{size / 2**20:>8.1f} MiB in {len(held):,} objects", flush=True)


PARTS: dict[str, Callable[[Path], None]] = {
    "reads": reads,
    "buckets": bucket_reads,
    "place": place,
    "restart": restart,
    "sample": sample,
    "layer": layer,
}

if __name__ == "__main__":
    main()
