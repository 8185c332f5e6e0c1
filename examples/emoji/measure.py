"""Drawings of the combinations that were held out → the share that is nearest to its true picture, and a grid

    python examples/emoji/measure.py out/emoji-pictures out/emoji-model -o out/emoji-grid.png

Each held-out name is drawn once. A drawing is right if, of the true pictures of all held-out names, none is nearer
than its own (mean squared difference of RGB levels; equal pictures count as one). Chance is the mean share of these
pictures that equal the own one. `activity`, `person` and `tone` say how often the nearest picture shares that part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PARTS = ("activity", "person", "tone")
SHOWN, SCALE, ROW = 24, 2, 6  # pictures of the grid, their enlargement, and how many pairs a row has


@dataclass(frozen=True)
class Truth:
    """What was held out: lines of metadata.jsonl, and their pictures as float32 [n, size, size, 3], 0 to 255."""

    lines: list[dict[str, Any]]
    pictures: np.ndarray

    @property
    def names(self) -> list[str]:
        return [line["caption"] for line in self.lines]


def held_out(folder: Path, size: int) -> Truth:
    """Return the held-out rows of a folder that table.py wrote, their pictures shrunk to `size` by area."""
    with (folder / "metadata.jsonl").open(encoding="utf-8") as file:
        lines = [line for line in map(json.loads, file) if line["held_out"]]
    if not lines:
        sys.exit(f"{folder}: no picture is held out. Fix: run table.py without --limit")
    shrunk = []
    for line in lines:
        with Image.open(folder / line["file_name"]) as image:
            shrunk.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BOX), np.float32))
    return Truth(lines, np.stack(shrunk))


def distances(drawn: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return mean squared differences [drawn, true] of pictures [n, size, size, 3]."""
    return np.stack([np.square(true - one).mean(axis=(1, 2, 3)) for one in drawn])


def shares(found: np.ndarray, same: np.ndarray, lines: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return name → (share, chance).

    `found` are distances [n, n] of drawings (rows) to true pictures; `same` [n, n] says which true pictures are equal.
    """
    nearest = found.argmin(axis=1)
    own = np.arange(len(found))
    measured = {"nearest": (float(same[own, nearest].mean()), float(same.mean()))}
    for part in PARTS:
        values = np.array([line[part] for line in lines])
        agree = (values[:, None] == values[None, :]) | same
        measured[part] = (float(agree[own, nearest].mean()), float(agree.mean()))
    return measured


def decoded(autoencoder: Path, pictures: np.ndarray) -> np.ndarray:
    """Return the pictures after the autoencoder, the best that drawings in its latents can be expected to be."""
    import torch
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(autoencoder).eval()
    given = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        out = torch.cat([model.decode(model.encode(some).latent_dist.mode()).sample for some in given.split(32)])
    return ((out.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()


def grid(drawn: np.ndarray, true: np.ndarray) -> Image.Image:
    """Return pairs, a drawing left of its true picture, spread over all that were held out."""
    chosen = np.linspace(0, len(drawn) - 1, min(SHOWN, len(drawn))).round().astype(int)
    size, gap = drawn.shape[1] * SCALE, 6
    rows = -(-len(chosen) // ROW)
    sheet = Image.new("RGB", (ROW * (2 * size + 2 * gap) - gap, rows * (size + gap) - gap), (200, 200, 200))
    for place, index in enumerate(chosen):
        for side, pixels in enumerate((drawn[index], true[index])):
            x, y = place % ROW * (2 * size + 2 * gap) + side * size, place // ROW * (size + gap)
            enlarged = Image.fromarray(pixels.round().astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x, y))
    return sheet


def main() -> None:
    import capstan

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("emoji-grid.png"))
    parser.add_argument("--size", type=int, default=32, help="Side of the recipe's images in pixels.")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    truth = held_out(chosen.pictures, chosen.size)
    seeds = [chosen.seed + number for number in range(len(truth.names))]
    images = capstan.sample(chosen.run, truth.names, seeds=seeds, batch=64)
    drawn = np.stack([np.asarray(image, np.float32) for image in images])
    same = distances(truth.pictures, truth.pictures) == 0
    best = decoded(chosen.run / "product" / "vae", truth.pictures)
    measured = shares(distances(drawn, truth.pictures), same, truth.lines)
    ceiling = shares(distances(best, truth.pictures), same, truth.lines)
    print(f"{len(drawn)} names held out, {len(np.unique(truth.pictures, axis=0))} different pictures")
    for name, (share, chance) in measured.items():
        print(f"{name:9} {share:.3f}   chance {chance:.3f}   autoencoder {ceiling[name][0]:.3f}")
    grid(drawn, truth.pictures).save(chosen.output)
    print(chosen.output)


if __name__ == "__main__":
    main()
