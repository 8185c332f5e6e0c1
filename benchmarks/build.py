"""`capstan build` compared with img2dataset 1.47 and with a bare decode-resize-encode loop: CPU and time per image.

    python benchmarks/build.py [--photos 20000] [--repeats 3] [--only http|tars|copy|memory]

One nginx on loopback serves the same photos to both. img2dataset runs in a virtual environment of its own, made once in
the work folder. Runs alternate, and medians are shown. Start-up is measured by a run over a few photos and shown
separately: figures per image are (whole run - start-up) / (photos - few). CPU seconds are those of all processes that a
command starts, without nginx. The floor is one process that decodes (scaled), resizes and encodes the same bytes from
memory with simplejpeg and OpenCV, as Capstan does.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import yaml
from measure import Run, measure
from photos import make_photos, served

from capstan.pipeline.image.resize import shrink

FEW = 1000  # photos of the start-up run: enough that no worker finishes before the other has started
CAPSTAN = [sys.executable, "-m", "capstan"]
ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"256 center_crop": (256, "center_crop"), "512 keep_ratio": (512, "keep_ratio")}


@dataclass(frozen=True)
class Cost:
    """The cost of start-up, and of each further photo, in seconds."""

    startup_wall: float
    startup_cpu: float
    wall: float  # an image
    cpu: float  # an image
    memory: int

    @classmethod
    def of(cls, few: Run, all_: Run, count: int) -> Cost:
        more = count - FEW
        return cls(
            few.wall_s,
            few.cpu_s,
            (all_.wall_s - few.wall_s) / more,
            (all_.cpu_s - few.cpu_s) / more,
            all_.memory,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["http", "tars", "copy", "memory"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "capstan-bench")
    arguments = parser.parse_args()
    work, count = arguments.work.resolve(), arguments.photos
    paths = make_photos(work / "photos", count)
    size = sum(path.stat().st_size for path in paths)
    print(f"{count:,} photos, {size / count / 1000:.0f} kB on average; medians of {arguments.repeats} interleaved runs")
    parts = {"http": over_http, "tars": from_tars, "copy": as_they_are, "memory": memory}
    for name, part in parts.items():
        if arguments.only in (None, name):
            part(work, paths, arguments.repeats)


# Runs ----------------------------------------------------------------------------------------------------------------


def capstan(work: Path, source: dict, size: int, resize: str, count: int) -> Run:
    """Build a new dataset of `count` photos. It has at least two units, one per worker."""
    dataset = work / "dataset"
    shutil.rmtree(dataset, ignore_errors=True)
    recipe = {
        "dataset": str(dataset),
        "source": source,
        "fetch": {"allow_private": True, "per_host": 64},
        "image": {"size": size, "resize": resize},
        "dedup": {"exact": True, "perceptual": None},  # all photos derive from a few, so all would be near duplicates
        "unit": {"rows": min(2500, count // 2)},
    }
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return measure([*CAPSTAN, "build", str(path), "--json"], {"PYTHONPATH": str(ROOT)})


def img2dataset(work: Path, table: Path, size: int, resize: str, count: int) -> Run:
    target = work / "img2dataset"
    shutil.rmtree(target, ignore_errors=True)
    options = {
        "url_list": table,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": target,
        "processes_count": 2,
        "thread_count": 32,
        "image_size": size,
        "resize_mode": resize,
        "resize_only_if_bigger": True,
        "number_sample_per_shard": min(2500, count // 2),
        "enable_wandb": False,
    }
    return measure([str(_other_python(work).parent / "img2dataset"), *(f"--{k}={v}" for k, v in options.items())])


def _other_python(work: Path) -> Path:
    """Return the Python of img2dataset's own environment, which is made if missing."""
    python = work / "img2dataset-env" / "bin" / "python"
    if not (python.parent / "img2dataset").exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "img2dataset==1.47.0"], check=True)
    return python


def floor(paths: list[Path], size: int, resize: str, sample: int = 2000) -> float:
    """Return the CPU seconds per image of the bare loop over bytes in memory."""
    cv2.setNumThreads(1)
    data = [path.read_bytes() for path in random.Random(0).sample(paths, min(sample, len(paths)))]
    start = _cpu_s()
    for photo in data:
        height, width, _, _ = simplejpeg.decode_jpeg_header(photo)
        scale = min(1.0, size / min(height, width))
        wanted = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = simplejpeg.decode_jpeg(photo, "RGB", min_width=wanted[0], min_height=wanted[1], min_factor=2)
        pixels = shrink(pixels, wanted)
        if resize == "center_crop":
            side = min(wanted)
            left, top = (wanted[0] - side) // 2, (wanted[1] - side) // 2
            pixels = pixels[top : top + side, left : left + side].copy()
        simplejpeg.encode_jpeg(pixels, 95, colorsubsampling="420")
    return (_cpu_s() - start) / len(data)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# Tables --------------------------------------------------------------------------------------------------------------


def over_http(work: Path, paths: list[Path], repeats: int) -> None:
    with served(work / "photos", work / "nginx") as site:
        urls = [f"{site}/{path.parent.name}/{path.name}" for path in paths]
        tables = {number: _url_table(work, urls[:number]) for number in (FEW, len(urls))}
        for name, (size, resize) in SETTINGS.items():
            ours: Callable[[int], Run] = lambda n: capstan(work, {"path": str(tables[n])}, size, resize, n)  # noqa: E731,B023
            theirs: Callable[[int], Run] = lambda n: img2dataset(work, tables[n], size, resize, n)  # noqa: E731,B023
            found = _interleaved({"capstan": ours, "img2dataset": theirs}, len(urls), repeats)
            bare = statistics.median(floor(paths, size, resize) for _ in range(repeats))
            _show(f"HTTP, {name}", found, bare)
            a, b = found["capstan"], found["img2dataset"]
            print(f"  CPU {a.cpu / b.cpu:.2f} of img2dataset's (goal: 0.33), wall clock {a.wall / b.wall:.2f} (0.50)")
            print(f"  CPU {a.cpu / bare:.2f} × the floor (goal: 1.35)", flush=True)


def from_tars(work: Path, paths: list[Path], repeats: int) -> None:
    folder = work / "tars"
    sources = {number: {"path": f"{_tars(folder / str(number), paths[:number])}/*.tar"} for number in (FEW, len(paths))}
    for name, (size, resize) in SETTINGS.items():
        ours: Callable[[int], Run] = lambda n: capstan(work, sources[n], size, resize, n)  # noqa: E731,B023
        found = _interleaved({"capstan": ours}, len(paths), repeats)
        bare = statistics.median(floor(paths, size, resize) for _ in range(repeats))
        _show(f"local tars, {name}", found, bare)
        print(f"  CPU {found['capstan'].cpu / bare:.2f} × the floor (goal: 1.20)")


def as_they_are(work: Path, paths: list[Path], repeats: int) -> None:
    """Compare packing of tars whose images already fit with `cp` of the same bytes."""
    few, whole = (_tars(work / "tars" / str(number), paths[:number]) for number in (FEW, len(paths)))
    size = sum(path.stat().st_size for path in whole.iterdir())
    ours, copies = [], []
    for _ in range(repeats):
        start_up = capstan(work, {"path": f"{few}/*.tar"}, 16_384, "keep_ratio", FEW)
        all_ = capstan(work, {"path": f"{whole}/*.tar"}, 16_384, "keep_ratio", len(paths))
        ours.append(all_.wall_s - start_up.wall_s)
        target = work / "copy"
        shutil.rmtree(target, ignore_errors=True)
        start = time.monotonic()
        subprocess.run(["cp", "-r", str(whole), str(target)], check=True)
        copies.append(time.monotonic() - start)
    a, b = statistics.median(ours), statistics.median(copies)
    print(f"\nimages that already fit, from tars, {size / 1e9:.2f} GB, without start-up")
    print(f"  capstan {a:.1f} s, {size / a / 1e6:,.0f} MB/s · cp {b:.1f} s, {size / b / 1e6:,.0f} MB/s")
    print(f"  {b / a:.2f} of the speed of cp (goal: 0.60)")


def memory(work: Path, paths: list[Path], repeats: int) -> None:
    """Measure the peak memory of all processes for as many rows as photos, and for ten times as many."""
    print("\nmemory of all processes together (sum of proportional set sizes, peak), 256 center_crop")
    with served(work / "photos", work / "nginx") as site:
        for times in (1, 10):
            urls = [f"{site}/{path.parent.name}/{path.name}?{turn}" for turn in range(times) for path in paths]
            run = capstan(work, {"path": str(_url_table(work, urls))}, 256, "center_crop", len(urls))
            print(f"  {len(urls):>9,} rows: {run.memory / 2**30:.2f} GiB (goal: under 2.5, flat)", flush=True)


def _interleaved(kinds: dict[str, Callable[[int], Run]], count: int, repeats: int) -> dict[str, Cost]:
    runs: dict[str, list[tuple[Run, Run]]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, run in kinds.items():
            runs[kind].append((run(FEW), run(count)))
    found = {}
    for kind, pairs in runs.items():
        costs = [Cost.of(few, whole, count) for few, whole in pairs]
        names = Cost.__dataclass_fields__
        found[kind] = Cost(**{name: statistics.median(getattr(cost, name) for cost in costs) for name in names})
    return found


def _show(title: str, found: dict[str, Cost], bare: float) -> None:
    print(f"\n{title}")
    print(
        f"  {'':<12}{'CPU ms/image':>13}{'wall ms/image':>14}{'start-up s':>12}{'start-up CPU s':>15}{'memory GiB':>12}"
    )
    for kind, cost in found.items():
        print(
            f"  {kind:<12}{cost.cpu * 1e3:>15.2f}{cost.wall * 1e3:>15.2f}{cost.startup_wall:>15.1f}"
            f"{cost.startup_cpu:>15.1f}{cost.memory / 2**30:>15.2f}"
        )
    print(f"  {'floor':<12}{bare * 1e3:>15.2f}", flush=True)


def _url_table(work: Path, urls: list[str]) -> Path:
    path = work / f"urls-{len(urls)}.parquet"
    captions = [f"photo number {number}" for number in range(len(urls))]
    pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    return path


def _tars(folder: Path, paths: list[Path]) -> Path:
    """Return the photos as WebDataset tars in `folder`, which are made if missing."""
    done = folder / ".done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for start in range(0, len(paths), 5000):
            with tarfile.open(folder / f"{start // 5000:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for path in paths[start : start + 5000]:
                    tar.add(path, path.name)
        done.touch()
    return folder


if __name__ == "__main__":
    main()
