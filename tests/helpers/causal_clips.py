"""A video autoencoder of a few weights, and recipes of families of clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from family_runs import small_run

from capstan.pipeline.config import Recipe

FRAMES = 5  # of a clip of the dataset, which has six: 1 + 2 · 2
STAGE: dict[str, Any] = {"frames": FRAMES, "time_ratio": 2, "block_out_channels": [4, 8], "layers_per_block": 1}
STAGE |= {"norm_num_groups": 2, "latent_channels": 2}
TRANSFORMER: dict[str, Any] = {"layers": 1, "heads": 2, "head_width": 16, "time_width": 8}
TEXT: dict[str, Any] = {"length": 24, "width": 16, "layers": 1, "heads": 2}


def recipe(dataset: Path, run: Path, model: str, steps: int, settings: dict[str, Any], **section: Any) -> Recipe:
    """A recipe of a family that reads clips, in a folder `run`."""
    train = small_run(model, run, steps) | {"batch": 4, model: settings} | section
    train["data"] = {"layer": None, "holdout": 4} | section.get("data", {})
    return Recipe(dataset=str(dataset), source={"path": "clips.tar"}, train=train)
