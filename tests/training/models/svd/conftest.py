"""A dataset of clips, an image run whose weights the family svd takes, and tiny runs of it."""

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
    """24 clips."""
    return write_clips(tmp_path_factory.mktemp("clips") / "ds", [12, 12])


@pytest.fixture(scope="session")
def image_run(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet that normalises in 32 groups, the only number that video networks have."""
    root = tmp_path_factory.mktemp("image")
    torch.set_num_threads(1)
    vae = tiny.save_autoencoder(clips, root / "ae")
    unet = {"block_out_channels": [64, 64], "layers_per_block": 1, "norm_num_groups": 32, "heads": 2}
    settings = {"unet": unet, "text": tiny.OWN, "autoencoder": vae, "sampling": {"steps": 2, "guidance": 2.0}}
    return tiny.save_product(tiny.family_of(clips, root / "assets", settings), root / "run")


@pytest.fixture(scope="session")
def make(clips: Path, image_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(run, steps, settings, key=value, …)`: a recipe of the family in a folder `run`."""
    root = tmp_path_factory.mktemp("svd")

    def recipe(run: str, steps: int = 2, svd: dict[str, Any] | None = None, **section: Any) -> Recipe:
        base = {"model": "svd", "run": str(root / run), "steps": steps, "batch": 4, "lr": 1e-3, "log_every": 1}
        base |= {"ema": 0.5, "checkpoint": {"every": 1, "keep": 1}, "engine": {"strategy": "ddp", "threads": 1}}
        settings: dict[str, Any] = {"after": str(image_run), "frames": FRAMES, "condition_width": 8}
        settings |= {"image_encoder": {"width": 16, "layers": 1, "heads": 2, "patch": 112}}
        settings |= {"sampling": {"steps": 2, "guidance": 2.0, "sigma_max": 50}} | (svd or {})
        section["data"] = {"layer": None, "holdout": 4} | section.get("data", {})
        return Recipe(
            dataset=str(clips),
            source={"path": "clips.tar"},
            train=base | {"watch": {"trackers": []}, "svd": settings} | section,
        )

    return recipe


@pytest.fixture(scope="session")
def run(make: Make) -> Path:
    torch.set_num_threads(1)
    return Path(fit(make("run"))["run"])
