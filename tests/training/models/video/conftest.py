"""A dataset of clips, an image run over their middle frames, and tiny runs of the family video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_networks as tiny
import torch
from moving_clips import FRAMES, write_clips

from capstan.pipeline.config import Recipe
from capstan.training.trainer import fit

Make = Callable[..., Recipe]


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips and four images."""
    return write_clips(tmp_path_factory.mktemp("clips") / "ds", [14, 14], images=2)


@pytest.fixture(scope="session")
def image_run(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("image")
    torch.set_num_threads(1)
    vae = tiny.save_autoencoder(clips, root / "ae")
    text = tiny.OWN | {"length": 48}
    settings = tiny.NETWORKS["sd"] | {"text": text, "autoencoder": vae, "sampling": {"steps": 2, "guidance": 2.0}}
    return tiny.save_product(tiny.family_of(clips, root / "assets", settings), root / "run")


@pytest.fixture(scope="session")
def make(clips: Path, image_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(run, steps, settings, key=value, …)`: a recipe of the family in a folder `run`."""
    root = tmp_path_factory.mktemp("video")

    def recipe(run: str, steps: int = 3, video: dict[str, Any] | None = None, **section: Any) -> Recipe:
        base = {"model": "video", "run": str(root / run), "steps": steps, "batch": 4, "lr": 1e-3, "log_every": 1}
        base |= {"ema": 0.5, "checkpoint": {"every": 1, "keep": 1}, "engine": {"strategy": "ddp", "threads": 1}}
        settings = {"after": str(image_run), "frames": FRAMES, "motion": {"heads": 2}} | (video or {})
        settings = {"sampling": {"steps": 2, "guidance": 2.0}} | settings
        section["data"] = {"layer": None, "holdout": 4} | section.get("data", {})
        return Recipe(
            dataset=str(clips),
            source={"path": "clips.tar"},
            train=base | {"watch": {"trackers": []}, "video": settings} | section,
        )

    return recipe


@pytest.fixture(scope="session")
def run(make: Make) -> Path:
    torch.set_num_threads(1)
    return Path(fit(make("run", 3, {"trained": ["motion", "text"]}))["run"])
