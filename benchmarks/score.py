"""CLIP scoring: how long the model waits for images, and the cost of decoding and model, together and apart.

    python benchmarks/score.py [--images 2000] [--model ViT-B-32] [--batch 64]

A CLIP of this architecture with random weights scores drawn images of 512 × 384 pixels through the unit map, on all
cores and on a GPU if there is one. Waiting is the share of the time between the first and the last batch in which a
model worker had none, without the first batch (a warm-up). CPU seconds are those of all processes. A run over few
images is subtracted, which leaves the cost of each further one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
from measure import measure

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Sample, write_tar
from capstan.pipeline.ingest.job import STAGED_SCHEMA, Staged
from capstan.pipeline.score import job as scoring
from capstan.pipeline.score import registry
from capstan.pipeline.score.job import ModelScoreJob, score
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Piece, Unit

ROOT = Path(__file__).resolve().parents[1]
UNIT_ROWS = 500
CORES = len(os.sched_getaffinity(0))


class Timed(ModelScoreJob):
    """A model that records when each batch started and ended."""

    def model(self) -> Callable[[Piece], Piece]:
        apply, log = super().model(), Path(self.storage.url) / f"times-{os.getpid()}.jsonl"

        def timed(piece: Piece) -> Piece:
            start = time.monotonic()
            made = apply(piece)
            with log.open("a") as file:
                file.write(json.dumps([start, time.monotonic(), len(piece["seen"])]) + "\n")
            return made

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--run", nargs=2, metavar=("FOLDER", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        part(Path(arguments.run[0]), arguments.run[1])
        return
    with tempfile.TemporaryDirectory(prefix="capstan-bench-score-") as name:
        compare(Path(name), arguments)


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    few = UNIT_ROWS
    for size in (few, arguments.images):
        make(folder / str(size), size, arguments.model, arguments.batch)
    more = arguments.images - few

    def cpu_ms(what: str) -> float:
        """Return the CPU milliseconds of each further image."""
        taken = [run(folder / str(size), what).cpu_s for size in (few, arguments.images)]
        return (taken[1] - taken[0]) / more * 1e3

    decode, model, whole = cpu_ms("decode"), cpu_ms("model"), cpu_ms("job")
    waited, rate = waiting(folder / str(arguments.images))
    print(f"{arguments.model}, batches of {arguments.batch}, {arguments.images:,} images, {CORES} cores, {device()}")
    print(f"  decoding alone {decode:.1f} ms CPU per image · the model alone {model:.1f} ms")
    print(f"  both as a job  {whole:.1f} ms, {whole / (decode + model):.2f} × their sum (goal: 1.15)")
    print(f"  the model waited {waited:.1%} of the time (goal: under 5%) · {rate:.1f} images/s")


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def run(folder: Path, what: str) -> Any:
    return measure([sys.executable, __file__, "--run", str(folder), what], {"PYTHONPATH": str(ROOT)}, memory=False)


def part(folder: Path, what: str) -> None:
    """Decode, or apply the model to decoded images, or run both as a job; in a process of its own."""
    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text())
    storage, scorers = Storage(recipe.dataset), registry.scorers(recipe)
    units = [Staged(**unit) for unit in json.loads((folder / "units.json").read_text())]
    if what == "job":
        scoring.ModelScoreJob = Timed  # type: ignore[misc]
        storage.delete(*storage.names("state"), *storage.names("scores"))
        for log in folder.glob("ds/times-*.jsonl"):
            log.unlink()
        score(recipe, storage, scorers, units, progress=False)
        return
    job = ModelScoreJob(storage, scorers, recipe.score.clip.batch if recipe.score.clip else 1, recipe.resources)
    apply = job.model() if what == "model" else None
    for unit in units:
        spec = {"table": unit.table, "tar": unit.tar, "missing": [s.id for s in scorers], "have": {}, "before": {}}
        if apply is None:
            for _ in job.prepare(Unit(unit.unit, spec)):
                pass
        else:
            pixels = np.random.default_rng(0).integers(0, 256, (job.batch, 224, 224, 3), dtype=np.uint8)
            for start in range(0, unit.rows, job.batch):
                seen = list(range(start, min(start + job.batch, unit.rows)))
                reader = scorers[0]
                piece = {"readers": [reader.id], "found": {}, "seen": seen, "captions": ["an image"] * len(seen)}
                apply(piece | {"pixels": {reader.clip_model.id: pixels[: len(seen)]}})  # type: ignore[attr-defined]


def waiting(folder: Path) -> tuple[float, float]:
    """Return (share of the time in which model workers had no batch, images/s), once warm."""
    idle = busy = images = 0.0
    spans = []
    for log in (folder / "ds").glob("times-*.jsonl"):
        calls = [json.loads(line) for line in log.read_text().splitlines()][1:]
        busy += sum(end - start for start, end, _ in calls)
        idle += sum(b[0] - a[1] for a, b in itertools.pairwise(calls))
        images += sum(count for *_, count in calls)
        spans.append((calls[0][0], calls[-1][1]))
    seconds = max(end for _, end in spans) - min(start for start, _ in spans)
    return idle / (idle + busy), images / seconds


def make(folder: Path, images: int, model: str, batch: int) -> None:
    """Write staged units, and a recipe with a CLIP of random weights: an open_clip name, or a folder."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    clip = {"model": model, "batch": batch}
    if not Path(model).is_dir():
        weights = folder.parent / "weights.safetensors"
        if not weights.exists():
            save_file(open_clip.create_model(model).state_dict(), weights)
        clip["pretrained"] = str(weights)
    (folder / "recipe.json").write_text(json.dumps({"dataset": str(folder / "ds"), "score": {"clip": clip}}))
    storage, units = Storage(str(folder / "ds")), list[Staged]()
    jpegs = [draw(seed) for seed in range(100)]
    for number, first in enumerate(range(0, images, UNIT_ROWS)):
        keys = [f"{row:032x}" for row in range(first, min(first + UNIT_ROWS, images))]
        spans = write_tar(folder / "x.tar", [Sample(key, jpegs[n % 100]) for n, key in enumerate(keys)])
        units.append(Staged(f"0000-{number:06d}", f"staged/{number}.parquet", f"staged/{number}.tar", len(keys)))
        storage.put(folder / "x.tar", units[-1].tar)
        nothing = {f.name: "" if pa.types.is_string(f.type) else 0 for f in STAGED_SCHEMA}
        rows = [
            nothing | {"key": key, "caption": f"image {key}", "offset": offset, "size": size, "crc32": None}
            for key, (offset, size) in zip(keys, spans, strict=True)
        ]
        storage.write_table(units[-1].table, pa.Table.from_pylist(rows, STAGED_SCHEMA))
    (folder / "units.json").write_text(json.dumps([vars(unit) for unit in units]))


def draw(seed: int) -> bytes:
    """Return a JPEG of 512 × 384 with as much detail as photographs have: about 60 kB."""
    random = np.random.default_rng(seed)
    rough = cv2.resize(random.integers(0, 256, (24, 32, 3), dtype=np.uint8), (512, 384), interpolation=cv2.INTER_CUBIC)
    fine = random.normal(0, 6, (384, 512, 1))
    return simplejpeg.encode_jpeg(np.clip(rough + fine, 0, 255).astype(np.uint8), 90)


if __name__ == "__main__":
    main()
