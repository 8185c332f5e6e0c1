"""Capstan's loader compared with webdataset, on the same local tars, with the same decoding and number of workers.

    python benchmarks/loader.py [--samples 4000] [--size 256] [--workers 1 2] [--rounds 5] [--only speed|restart|share]

speed     images/s from the first batch on, and CPU time. Runs alternate, each in a process of its own; the ratio is
          that of the medians. webdataset: shuffled shards, a buffer of 1000 samples, decoding in processes of torch's
          DataLoader, each making whole batches. Capstan: its exact order, on threads. Both yield uint8 [B, 3, S, S]
          and captions.
restart   seconds to the first batch at sample 1,000,000 of an epoch, and at sample 0, in a dataset of two million
          samples (its rows share a thousand images); and whether a resumed run equals an uninterrupted one
share     how much of a sample's time is spent outside of decoding, where threads wait for each other
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from capstan.pipeline.dataset.shards import (  # noqa: E402
    Dataset,
    Manifest,
    Sample,
    ShardEntry,
    sha256_of,
    write_manifest,
    write_samples,
)
from capstan.pipeline.records import SHARD_SCHEMA, make_key  # noqa: E402
from capstan.pipeline.storage import Storage  # noqa: E402
from capstan.training.config import Data  # noqa: E402
from capstan.training.data.dataset import TrainingData  # noqa: E402
from capstan.training.data.loader import Loader  # noqa: E402
from capstan.training.data.mixture import MixedData  # noqa: E402
from capstan.training.data.transforms import batch_of, square  # noqa: E402

BATCH = 64
PER_SHARD = 500
STORED = 512  # pixels of a stored image's shorter side
SHARDS, ROWS, IMAGES = 200, 10_000, 1_000  # of the dataset for `restart`
PLACE = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "capstan-bench-loader")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--run", nargs=2, metavar=("WHO", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        who, workers = arguments.run
        print(json.dumps(RUNS[who](arguments, int(workers))))
        return
    print(f"{len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, OpenCV {cv2.__version__}")
    for part in [arguments.only] if arguments.only else PARTS:
        PARTS[part](arguments)


# Datasets ------------------------------------------------------------------------------------------------------------


def write_dataset(folder: Path, shards: list[list[bytes]], rows: int | None = None) -> None:
    """Write a finished dataset of these images; with `rows` each shard's table repeats them to that many rows."""
    storage, entries = Storage(str(folder)), []
    (folder / "shards").mkdir(parents=True)
    for number, jpegs in enumerate(shards):
        name = f"shard-{number:06d}"
        tar = folder / "shards" / f"{name}.tar"
        keys = [make_key(f"{number} {row}") for row in range(rows or len(jpegs))]
        samples = [
            Sample(keys[row], jpeg, {"key": keys[row]}, f"photograph {row} of shard {number}")
            for row, jpeg in enumerate(jpegs)
        ]
        places = write_samples(tar, samples)
        table = [row_of(keys, row, samples, places) for row in range(len(keys))]
        storage.write_table(f"shards/{name}.parquet", pa.Table.from_pylist(table, SHARD_SCHEMA))
        entries.append(
            ShardEntry(name=name, samples=len(keys), bytes=tar.stat().st_size, sha256=sum_of(number), table_sha256="")
        )
    write_manifest(storage, Manifest(shards=entries))


def sum_of(number: int) -> str:
    """Return what stands for a tar's checksum, which is not compared."""
    return f"{number:064x}"


def row_of(keys: list[str], row: int, samples: list[Sample], places: Sequence[Any]) -> dict[str, Any]:
    sample, place = samples[row % len(samples)], places[row % len(samples)]
    width, height = size_of(sample.jpg)
    return {
        **dict.fromkeys(SHARD_SCHEMA.names, 0),
        **{"key": keys[row], "caption": sample.caption, "url": "", "sha256": sha256_of(sample.jpg), "colours": ""},
        **{"extra": "{}", "width": width, "height": height, "original_width": width, "original_height": height},
        **place._asdict(),
    }


def size_of(jpeg: bytes) -> tuple[int, int]:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg)).size


def stored(path: Path) -> bytes:
    """Return a photograph as a build with `image: {size: 512}` stores it."""
    pixels = cv2.imread(str(path))
    scale = STORED / min(pixels.shape[:2])
    if scale < 1:
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def photos(arguments: argparse.Namespace, count: int) -> Iterator[bytes]:
    from photos import make_photos

    return (stored(path) for path in make_photos(arguments.work / "photos", count))


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`, made if it is missing or incomplete."""
    if not (folder / "dataset.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
    return folder


def speed_dataset(arguments: argparse.Namespace) -> Path:
    def make(folder: Path) -> None:
        jpegs = list(photos(arguments, arguments.samples))
        write_dataset(folder, [jpegs[start : start + PER_SHARD] for start in range(0, len(jpegs), PER_SHARD)])

    return made(arguments.work / f"speed-{arguments.samples}", make)


def restart_dataset(arguments: argparse.Namespace) -> Path:
    """Write one real shard under many names, as hard links."""

    def make(folder: Path) -> None:
        write_dataset(folder, [list(photos(arguments, IMAGES))], ROWS)
        first = read_entry(folder)
        names = [f"shard-{number:06d}" for number in range(SHARDS)]
        for name in names[1:]:
            for ending in ("tar", "parquet"):
                os.link(folder / "shards" / f"{names[0]}.{ending}", folder / "shards" / f"{name}.{ending}")
        entries = [
            first.model_copy(update={"name": name, "sha256": sum_of(number)}) for number, name in enumerate(names)
        ]
        write_manifest(Storage(str(folder)), Manifest(shards=entries))

    return made(arguments.work / f"restart-{SHARDS}", make)


def read_entry(folder: Path) -> ShardEntry:
    return Dataset(Storage(str(folder))).manifest.shards[0]


def open_data(folder: Path, **settings: Any) -> TrainingData:
    data = Data.model_validate({"layer": None, **settings})
    return TrainingData(Dataset(Storage(str(folder))), data, 0, layer=None, batch=BATCH, lanes=8)  # as in a new run


# Speed ---------------------------------------------------------------------------------------------------------------


def run_capstan(arguments: argparse.Namespace, workers: int) -> tuple[float, float]:
    def prepare(samples: Sequence[Any]) -> Any:
        return {"pictures": batch_of(samples, arguments.size), "texts": [sample.text for sample in samples]}

    torch.set_num_threads(1)  # as in the DataLoader's workers
    data = open_data(speed_dataset(arguments))
    steps = arguments.samples // BATCH
    with Loader(data, prepare, batch=BATCH, start=0, stop=steps, threads=workers, prefetch=2 * workers) as loader:
        return rate(loader, lambda prepared: prepared.batch["pictures"])


def run_webdataset(arguments: argparse.Namespace, workers: int) -> tuple[float, float]:
    import webdataset as wds

    def decode(sample: dict[str, Any]) -> tuple[np.ndarray, str]:
        return square(sample["jpg"], arguments.size), sample["txt"].decode()

    def collate(samples: Sequence[tuple[np.ndarray, str]]) -> tuple[torch.Tensor, list[str]]:
        images = torch.from_numpy(np.stack([image for image, _ in samples]))
        return images.permute(0, 3, 1, 2).contiguous(), [text for _, text in samples]

    cv2.setNumThreads(1)
    urls = [str(path) for path in sorted((speed_dataset(arguments) / "shards").glob("*.tar"))]
    dataset = wds.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000).map(decode)
    dataset = dataset.batched(BATCH, collation_fn=collate, partial=False)
    return rate(wds.WebLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=2), lambda batch: batch[0])


def rate(batches: Any, images: Callable[[Any], torch.Tensor]) -> tuple[float, float]:
    """Return images/s from the first batch to the last, and CPU ms per image of this process and its workers."""
    cpu, count, first, start = cpu_s(), 0, 0, 0.0
    for batch in batches:
        count += len(images(batch))
        if not first:
            first, start = count, time.perf_counter()
    took = time.perf_counter() - start
    return (count - first) / took, (cpu_s() - cpu) / count * 1000


def cpu_s() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def speed(arguments: argparse.Namespace) -> None:
    speed_dataset(arguments)
    print(f"\nspeed at {arguments.size} px, batches of {BATCH}, {arguments.samples} samples: medians (ranges)")
    print(f"{'workers':>8}{'':>14}{'capstan':>20}{'webdataset':>20}{'ratio':>8}")
    for workers in arguments.workers:
        found: dict[str, list[list[float]]] = {"capstan": [], "webdataset": []}
        for number in range(arguments.rounds):
            for who in sorted(found, reverse=bool(number % 2)):
                found[who].append(in_process(arguments, who, workers))
        for column, what in enumerate(("images/s", "CPU ms/image")):
            values = [[run[column] for run in runs] for runs in found.values()]
            ratio = statistics.median(values[0]) / statistics.median(values[1])
            told = "".join(f"{in_words(some):>20}" for some in values)
            print(f"{workers:>8}{what:>14}{told}{ratio:>8.2f}", flush=True)


def in_process(arguments: argparse.Namespace, who: str, workers: int) -> Any:
    command = [sys.executable, __file__, "--samples", str(arguments.samples), "--size", str(arguments.size)]
    command += ["--work", str(arguments.work), "--run", who, str(workers)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def in_words(values: list[float]) -> str:
    digits = 0 if min(values) > 50 else 2
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


# Restart -------------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "one dataset": {},
    "with buckets": {"buckets": {"size": 256}},
    "two datasets": {},
}


def open_kind(folder: Path, name: str) -> TrainingData | MixedData:
    """Return the samples of one of KINDS."""
    data = open_data(folder, **KINDS[name])
    return data if name != "two datasets" else MixedData([data, open_data(folder)], ["a", "b"], [0.8, 0.2], 0)


def run_restart(arguments: argparse.Namespace, kind: int) -> list[float]:
    """Measure the seconds to the first batch, in the middle and at the beginning, without imports."""
    name = list(KINDS)[kind]
    seconds = []
    for place in (PLACE, 0):
        start = time.perf_counter()
        data = open_kind(restart_dataset(arguments), name)
        with Loader(data, lambda samples: {"x": batch_of(samples, 256)}, **steps(place // BATCH, 1)) as loader:
            next(iter(loader))
        seconds.append(time.perf_counter() - start)
    return seconds


def steps(start: int, count: int) -> dict[str, int]:
    return {"batch": BATCH, "start": start, "stop": start + count}


def restart(arguments: argparse.Namespace) -> None:
    folder = restart_dataset(arguments)
    print(f"\nrestart: seconds to the first batch, {SHARDS * ROWS:,} samples in {SHARDS} shards")
    print(f"{'':<16}{f'at {PLACE:,}':>14}{'at 0':>10}")
    for number, name in enumerate(KINDS):
        runs = [in_process(arguments, "restart", number) for _ in range(arguments.rounds)]
        far, near = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"{name:<16}{far:>14.2f}{near:>10.2f}", flush=True)
    for name in KINDS:
        keys = [keys_of(open_kind(folder, name), *cut) for cut in ((PLACE // BATCH, 40), (PLACE // BATCH, 15))]
        rest = keys_of(open_kind(folder, name), PLACE // BATCH + 15, 25)
        print(f"  {name}: resumed equals uninterrupted: {keys[0] == keys[1] + rest}")


def keys_of(data: TrainingData | MixedData, start: int, count: int) -> list[str]:
    with Loader(data, lambda _: {}, threads=2, **steps(start, count)) as loader:
        return [key for prepared in loader for key in prepared.keys]


# Share ---------------------------------------------------------------------------------------------------------------


def run_share(arguments: argparse.Namespace, _: int) -> list[float]:
    """Measure the milliseconds per sample on one thread, with and without decoding."""
    data = open_data(speed_dataset(arguments))
    for number in range(BATCH):
        data.at(number)
    times = []
    for prepare in (lambda samples: batch_of(samples, arguments.size), lambda samples: None):
        start = time.perf_counter()
        for first in range(0, 1024, BATCH):
            prepare([data.at(number) for number in range(first, first + BATCH)])
        times.append((time.perf_counter() - start) / 1024 * 1000)
    return times


def share(arguments: argparse.Namespace) -> None:
    runs = [in_process(arguments, "share", 0) for _ in range(arguments.rounds)]
    whole, rest = (statistics.median(values) for values in zip(*runs, strict=True))
    print(f"\nshare: {whole:.2f} ms per sample on one thread, {rest:.3f} ms to find and read it ({rest / whole:.1%})")


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"speed": speed, "restart": restart, "share": share}
RUNS: dict[str, Callable[[argparse.Namespace, int], Any]] = {
    "capstan": run_capstan,
    "webdataset": run_webdataset,
    "restart": run_restart,
    "share": run_share,
}

if __name__ == "__main__":
    main()
