"""Copying a dataset into another (`image: {resize: none, check: header}`) against `cp` of the bytes that it writes.

    python benchmarks/reshard.py [--bytes 2000000000] [--rounds 3] [--folder FOLDER]     (make bench-reshard)

A dataset of JPEGs of about 100 kB with a column of scores is the source. Three jobs: shards of another size, two
datasets merged, a tenth selected by its scores. Each round runs `capstan build` and then `cp` and `sync` of the shards
that it wrote. "build": the stages of the build, without the start of Python; "whole": with it. The ratio is of
speeds: 1 is as fast as cp. "CPU": of the command and of cp and sync, all processes; other work on the machine changes
it least. `full` decodes every image (`check: full`), as all builds did before.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DRAWN = 64  # different images; each copy differs in its comment, and so in its SHA-256
OFF = {"exact": False, "perceptual": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=2_000_000_000, help="of the source")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="decode as well, once: slow")
    parser.add_argument("--job", type=int, default=None, help="run this one only, from 0")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        halves = [_source(folder, part, arguments.bytes // 2) for part in range(2)]
        shards = [str(half / "shards") for half in halves]
        few = [{"name": "best", "where": "((extra->>'$.extra')->>'$.score')::DOUBLE >= 0.9"}]
        jobs: dict[str, dict[str, Any]] = {
            "other shard size": {"source": {"path": shards[0]}, "shards": {"samples": 2500}},
            "two merged": {"source": {"path": shards}},
            "a tenth by its scores": {"source": {"path": shards}, "select": few},
        }
        columns = "bytes written | build, s | whole, s | cp, s | ratio (build) | ratio (whole) | CPU, s | CPU of cp, s"
        print(f"| job | {columns} |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        chosen = list(jobs.items())
        for job, recipe in chosen if arguments.job is None else [chosen[arguments.job]]:
            for check in ["header"] + ["full"] * arguments.full:
                rounds = [_round(folder, recipe, check) for _ in range(arguments.rounds if check == "header" else 1)]
                medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
                written, build, whole, copy, cpu, cpu_copy = medians
                times = f"{build:.2f} | {whole:.2f} | {copy:.2f} | {copy / build:.2f} | {copy / whole:.2f}"
                times += f" | {cpu:.2f} | {cpu_copy:.2f}"
                print(f"| {job}, {check} | {written / 1e6:,.0f} MB | {times} |", flush=True)


def _round(folder: Path, recipe: dict[str, Any], check: str) -> tuple[int, float, float, float, float, float]:
    """Return the bytes written; the seconds of the build, of its command, of cp; CPU seconds of the command, of cp."""
    target, copy, before = folder / "out", folder / "copy", _cpu()
    whole, summary = _build(folder, {**recipe, "dataset": str(target), "image": {"resize": "none", "check": check}})
    tars = sorted((target / "shards").glob("*.tar"))
    copy.mkdir()
    between = _cpu()
    start = time.monotonic()
    subprocess.run(["cp", *map(str, tars), str(copy)], check=True)
    subprocess.run(["sync", *(str(copy / tar.name) for tar in tars)], check=True)
    seconds = time.monotonic() - start
    written = sum(tar.stat().st_size for tar in tars)
    shutil.rmtree(target)
    shutil.rmtree(copy)
    stages = summary["seconds"]
    print(stages, file=sys.stderr)
    return written, sum(stages.values()), whole, seconds, between - before, _cpu() - between


def _cpu() -> float:
    """Return the CPU seconds of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _build(folder: Path, recipe: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dedup": OFF, "unit": {"rows": 2500}, **recipe}))
    start = time.monotonic()
    command = [sys.executable, "-m", "capstan", "build", str(path), "--json"]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return time.monotonic() - start, json.loads(done.stdout.splitlines()[-1])


def _source(folder: Path, part: int, size: int) -> Path:
    """Build a dataset with a column of scores out of drawn images, with about `size` bytes."""
    target, table = folder / f"source-{part}", folder / "rows.parquet"
    files = [_drawn(100 * part + number) for number in range(DRAWN)]
    count = max(100, size // (sum(map(len, files)) // DRAWN))
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string()), ("score", pa.float64())])
    with pq.ParquetWriter(table, schema) as writer:
        for rows in _rows(files, part, count):
            writer.write_table(pa.Table.from_pylist(rows, schema))
    source = {"path": str(table), "image": "image", "url": None}
    _build(folder, {"dataset": str(target), "source": source, "image": {"resize": "none", "check": "header"}})
    table.unlink()
    shutil.rmtree(target / "staged")
    return target


def _rows(files: list[bytes], part: int, count: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, count, 1000):
        yield [
            {
                "image": _with_comment(files[number % DRAWN], f"{part} {number}"),
                "caption": f"image {number} of part {part}",
                "score": int.from_bytes(hashlib.sha256(b"%d %d" % (part, number)).digest()[:4], "big") / 2**32,
            }
            for number in range(start, min(start + 1000, count))
        ]


def _drawn(seed: int) -> bytes:
    """Return a smooth image with noise: a JPEG of about 100 kB."""
    rng = np.random.default_rng(seed)
    low = Image.fromarray(rng.integers(30, 225, (12, 16, 3)).astype(np.uint8))
    smooth = low.resize((800, 600), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth).astype(np.int16) + rng.normal(0, 9, (600, 800, 1)).astype(np.int16)
    target = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(target, "jpeg", quality=80)
    return target.getvalue()


def _with_comment(data: bytes, text: str) -> bytes:
    body = text.encode()
    return data[:2] + b"\xff\xfe" + (len(body) + 2).to_bytes(2, "big") + body + data[2:]


if __name__ == "__main__":
    main()
