"""First stages trained for ten minutes on the captioned world: PSNR on held-out images, and use of the codebook.

    python benchmarks/first_stages.py [--minutes 10] [--threads 1] [--model autoencoder vqgan] [--folder DIR]

Drawings of 64 × 64 pixels. A KL autoencoder and a VQGAN of the same size, with latents 4× smaller along a side, both
with a discriminator in the last two fifths of their steps. First the CPU time of a step is measured, with and without
the discriminator. The run then has as many steps as fit into the minutes on idle cores, one per thread, so that a
shared machine makes the run longer and not worse. `capstan evaluate` measures it on scenes of another seed and writes a
grid of drawings and reconstructions into each run's folder. A run that was started in --folder resumes.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.remove(str(Path(__file__).resolve().parent))  # this folder has a recaption.py of its own

from capstan.pipeline.config import Recipe
from capstan.training.evaluate import evaluate
from capstan.training.trainer import fit

ROOT = Path(__file__).resolve().parents[1]
CAPSTAN = Path(sys.executable).with_name("capstan")
SIZE, BATCH, SCENES = 64, 16, 4000
PLAIN = 0.6  # share of the steps before the discriminator starts
FEW, MORE = 5, 25  # steps that measure the time of one

SHAPE = {
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 2,  # groups of two channels lose colour: 0.8 dB at 200 steps
    "mid_attention": False,
    "reconstruction": "l2",  # what PSNR measures: 2.6 dB better at 200 steps than absolute and edge differences
}
DISCRIMINATOR = {"weight": 0.5, "channels": 16, "layers": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "autoencoder": SHAPE | {"latent_channels": 4, "kl": 1e-4},
    "vqgan": SHAPE | {"latent_channels": 32, "codes": 512, "code_channels": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="capstan-bench-first-stages-") as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [measured(folder, model, arguments) for model in arguments.model]
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


def measured(folder: Path, model: str, arguments: argparse.Namespace) -> dict[str, str]:
    """Return a row of the table."""
    base, path, run = built(folder), folder / f"{model}.json", folder / model
    if not path.exists():
        count = steps(folder, base, model, arguments)
        train = section(model, run, count, round(count * PLAIN), arguments.threads)
        path.write_text(json.dumps(base | {"train": train}))
    train = json.loads(path.read_text())["train"]
    trained(folder, model, Recipe.model_validate_json(path.read_text()))
    measures = evaluate(run, count=256)["measures"]
    perplexity, used = (measures.get(name, {}).get("value") for name in ("perplexity", "codes_used"))
    return {
        "first stage": model,
        "steps": f"{train['steps']:,}",
        "from this one on with discriminator": f"{train[model]['discriminator']['start']:,}",
        "CPU minutes": f"{sum(json.loads(spent(folder, model).read_text())) / 60:.1f}",
        "PSNR, dB": f"{measures['psnr']['value']:.2f}",
        "of a mean colour": f"{measures['psnr']['chance']:.2f}",
        "perplexity": "–" if perplexity is None else f"{perplexity:.0f} of {SETTINGS[model]['codes']}",
        "codes used": "–" if used is None else f"{used:.0%}",
        "objects read by the oracle": f"{measures['colour_shape']['value']:.2f}",
        "by chance": f"{measures['colour_shape']['chance']:.2f}",
    }


def trained(folder: Path, model: str, recipe: Recipe) -> None:
    """Train to the end and record the CPU time, also of runs that were stopped."""
    begun, note = time.process_time(), spent(folder, model)
    summary = fit(recipe)
    parts = json.loads(note.read_text()) if note.exists() else []
    note.write_text(json.dumps([*parts, time.process_time() - begun]))
    if summary["stopped"]:
        sys.exit(130)


def spent(folder: Path, model: str) -> Path:
    return folder / f"{model}-cpu-seconds.json"


def steps(folder: Path, base: dict[str, Any], model: str, arguments: argparse.Namespace) -> int:
    """Return how many steps fit into the minutes, by the CPU time of a few steps."""

    def seconds(count: int, start: int) -> float:
        run = folder / f"{model}-{count}-{start}"
        section_ = section(model, run, count, start, arguments.threads)
        shutil.rmtree(run, ignore_errors=True)  # an earlier measurement: a finished run is not trained again
        begun = time.process_time()
        if fit(Recipe.model_validate(base | {"train": section_}))["stopped"]:
            sys.exit(130)
        return time.process_time() - begun

    seconds(FEW, 2)  # the first run of a process also loads libraries
    few = seconds(FEW, MORE)
    plain, opposed = ((seconds(MORE, start) - few) / (MORE - FEW) for start in (MORE, FEW))
    print(f"{model}: {plain:.3f} CPU s per step, {opposed:.3f} s with the discriminator", file=sys.stderr)
    return max(1, int(arguments.minutes * 60 * arguments.threads / (PLAIN * plain + (1 - PLAIN) * opposed)))


def built(folder: Path) -> dict[str, Any]:
    """Build the dataset if it is missing; return its recipe."""
    world = {"scenes": SCENES, "size": SIZE, "captions": "descriptive", "defects": False}
    base = {
        "dataset": str(folder / "ds"),
        "source": {"format": "world", "world": world},
        "image": {"size": SIZE, "min_size": 32, "quality": 95},
        "dedup": {"exact": True, "perceptual": None},
        "shards": {"samples": 1000},
        "unit": {"rows": 1000},
    }
    if not (folder / "ds" / "dataset.json").exists():
        (folder / "build.yaml").write_text(yaml.safe_dump(base))
        subprocess.run([CAPSTAN, "build", str(folder / "build.yaml")], cwd=ROOT, check=True)
    return base


def section(model: str, run: Path, count: int, start: int, threads: int) -> dict[str, Any]:
    """Return the section `train` for this many steps, with the discriminator from step `start` on."""
    return {
        "model": model,
        "run": str(run),
        "steps": count,
        "batch": BATCH,
        "lr": 3e-3,
        "schedule": "cosine",
        "final_lr": 0.05,
        "betas": [0.9, 0.99],
        "weight_decay": 0.0,
        "ema": 0.99,
        "engine": {"strategy": "ddp", "threads": threads},
        "data": {"layer": None},
        "checkpoint": {"every": 100},
        model: SETTINGS[model] | {"discriminator": DISCRIMINATOR | {"start": start}},
    }


if __name__ == "__main__":
    main()
