"""First stages trained for ten minutes on the captioned world: PSNR on held-out pictures, and use of the codebook.

    python benchmarks/first_stages.py [--minutes 10] [--model autoencoder vqgan] [--folder DIR]

Drawings of 64 × 64 pixels; a KL autoencoder and a VQGAN of the same size, both 4× smaller along a side, both with a
discriminator in the last two fifths of their steps. First a few steps of each are timed, without and with it; the run
then has as many as fit into the minutes at that rate. `capstan evaluate` measures on scenes of another seed, and puts a
grid of drawings beside their reconstructions into each run's folder. What was begun in --folder is gone on with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CAPSTAN = Path(sys.executable).with_name("capstan")
SIZE, BATCH, THREADS = 64, 32, 2
PLAIN = 0.6  # share of the steps before the discriminator comes in
TIMED = 12  # steps that are timed without the discriminator, and as many with it

SHAPE = {
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_attention": False,
    "edges": 0.5,
}
DISCRIMINATOR = {"weight": 0.5, "channels": 32, "layers": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "autoencoder": SHAPE | {"latent_channels": 4, "kl": 1e-4},
    "vqgan": SHAPE | {"latent_channels": 32, "codes": 512, "code_channels": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--model", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="capstan-bench-first-stages-") as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [measured(folder, model, arguments) for model in arguments.model]
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


def measured(folder: Path, model: str, arguments: argparse.Namespace) -> dict[str, str]:
    """A row of the table."""
    path, run = folder / f"{model}.yaml", folder / model
    base = built(folder, arguments.scenes)
    if not path.exists():
        write(path, base, section(model, run, steps(folder, base, model, arguments.minutes)))
    start = time.monotonic()
    capstan("train", path)
    took = time.monotonic() - start
    result = json.loads(capstan("evaluate", run, "--count", "256", "--json").splitlines()[-1])
    measures = result["measures"]
    train = yaml.safe_load(path.read_text())["train"]
    perplexity, used = (measures.get(name, {}).get("value") for name in ("perplexity", "codes_used"))
    print(f"{model}: {took / 60:.1f} minutes with start-up and end; grid: {run / 'evaluation.png'}", file=sys.stderr)
    return {
        "first stage": model,
        "steps": f"{train['steps']:,}",
        "of them with discriminator": f"{train['steps'] - train[model]['discriminator']['start']:,}",
        "PSNR, dB": f"{measures['psnr']['value']:.2f}",
        "of a mean colour": f"{measures['psnr']['chance']:.2f}",
        "perplexity": "–" if perplexity is None else f"{perplexity:.0f} of {SETTINGS[model]['codes']}",
        "codes used": "–" if used is None else f"{used:.0%}",
        "objects read by the oracle": f"{measures['colour_shape']['value']:.2f}",
        "by chance": f"{measures['colour_shape']['chance']:.2f}",
    }


def built(folder: Path, scenes: int) -> dict[str, Any]:
    """The recipe of the dataset, which is there when this returns."""
    world = {"scenes": scenes, "size": SIZE, "captions": "descriptive", "defects": False}
    base = {
        "dataset": str(folder / "ds"),
        "source": {"format": "world", "world": world},
        "image": {"size": SIZE, "min_size": 32, "quality": 95},
        "dedup": {"exact": True, "perceptual": None},
        "shards": {"samples": 1000},
        "unit": {"rows": 1000},
    }
    if not (folder / "ds" / "dataset.json").exists():
        write(folder / "build.yaml", base)
        capstan("build", folder / "build.yaml")
    return base


def section(model: str, run: Path, count: int) -> dict[str, Any]:
    """`train` for so many steps."""
    settings = SETTINGS[model] | {"discriminator": DISCRIMINATOR | {"start": round(count * PLAIN)}}
    return {
        "model": model,
        "run": str(run),
        "steps": count,
        "batch": BATCH,
        "lr": 1e-3,
        "schedule": "cosine",
        "final_lr": 0.05,
        "betas": [0.9, 0.99],
        "weight_decay": 0.0,
        "ema": 0.99,
        "engine": {"strategy": "ddp", "launcher": "local", "threads": THREADS},
        "data": {"layer": None},
        "checkpoint": {"every": 100},
        model: settings,
    }


def steps(folder: Path, base: dict[str, Any], model: str, minutes: float) -> int:
    """How many fit into the minutes, by the time that a few take, those that begin each phase left out."""
    path, run = folder / f"{model}-timed.yaml", folder / f"{model}-timed"
    train = section(model, run, 2 * TIMED) | {"log_every": 1}
    train[model]["discriminator"]["start"] = TIMED
    write(path, base, train)
    capstan("train", path)
    seconds = [BATCH / json.loads(line)["images_per_s"] for line in (run / "log.jsonl").read_text().splitlines()]
    plain, opposed = (statistics.median(part[3:]) for part in (seconds[:TIMED], seconds[TIMED:]))
    print(f"{model}: {plain:.3f} s a step, {opposed:.3f} s with the discriminator", file=sys.stderr)
    return max(1, int(minutes * 60 / (PLAIN * plain + (1 - PLAIN) * opposed)))


def write(path: Path, base: dict[str, Any], train: dict[str, Any] | None = None) -> None:
    path.write_text(yaml.safe_dump(base if train is None else base | {"train": train}))


def capstan(*arguments: object) -> str:
    """The command's standard output; ends this process with its exit code if it fails."""
    done = subprocess.run([CAPSTAN, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
