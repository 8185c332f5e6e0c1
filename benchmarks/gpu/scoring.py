"""CLIP scoring: images/s of the job, and its share of a bare loop over pixels that are already there."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.gpu.results import Measurement, Row, Scale

sys.path.append(str(Path(__file__).resolve().parents[1]))  # score.py's own `measure`; last, as names there are common
LEAST_SHARE = 0.95


def measure(scale: Scale) -> list[Row]:
    from benchmarks import score as benchmark

    folder = scale.folder / "scoring"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model, batch, images = scale("ViT-L-14", ""), scale(256, 16), scale(20_000, 40)
    if scale.toy:
        sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
        from small_clip import write_clip

        model = str(write_clip(folder / "clip", 0))
    benchmark.make(folder / "job", images, model, batch)
    recipe = folder / "job" / "recipe.json"
    settings = json.loads(recipe.read_text())
    settings["score"]["clip"]["precision"] = scale("bf16", "fp32")
    recipe.write_text(json.dumps(settings))
    bare = bare_rate(recipe, batch, scale(80, 2))
    if scale.toy:  # in this process: to start workers takes the time of all other measurements
        return [Row("bare loop", bare, "images/s")]
    benchmark.part(folder / "job", "job")
    waited, rate = benchmark.waiting(folder / "job")
    shutil.rmtree(folder)
    return [
        Row("bare loop", bare, "images/s", facts={"model": model, "batch": batch}),
        Row("scoring job", rate, "images/s"),
        Row("scoring job, share of the bare loop", rate / bare, "", LEAST_SHARE),
        Row("share of the time waiting for images", waited, "", 0.05, below=True),
    ]


def bare_rate(recipe_file: Path, batch: int, rounds: int) -> float:
    """Return the images/s of the recipe's CLIP over one batch of pixels, captions included."""
    import torch

    from capstan.pipeline.config import Recipe
    from capstan.pipeline.score.clip_model import ClipModel

    clip = Recipe.model_validate_json(recipe_file.read_text()).score.clip
    assert clip is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ClipModel(clip.model, clip.pretrained, clip.precision, "score.clip")
    loaded = model.load(device)
    how = model.preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (batch, how.height, how.width, 3), dtype=np.uint8)
    captions = [f"image {number}" for number in range(batch)]

    def once() -> float:
        similar = (loaded.normalize(loaded.images(pixels)) * loaded.normalize(loaded.texts(captions))).sum(-1)
        return float(similar.sum())  # waits for the GPU

    for _ in range(2):
        once()
    start = time.perf_counter()
    for _ in range(rounds):
        once()
    return batch * rounds / (time.perf_counter() - start)


MEASUREMENTS = [Measurement("CLIP scoring", 180, measure)]
