"""A dataset of squares, a first stage with codes over it, and tiny runs of the family dalle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.pipeline.config import Recipe
from capstan.training.trainer import fit

STAGE = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4, "codes": 32}
SMALL = {"text": {"vocab_size": 520, "length": 24}, "width": 16, "layers": 2, "heads": 2}

Make = Callable[..., Recipe]


@pytest.fixture(scope="session")
def stages(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family → a run of it, of one step, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("stages"), dict[str, Path]()
    tower = {"width": 16, "layers": 1, "heads": 2}
    settings = {"vqgan": STAGE, "dvae": STAGE, "autoencoder": {k: v for k, v in STAGE.items() if k != "codes"}}
    settings["vitvqgan"] = {"patch_size": 4, "encoder": tower, "decoder": tower, "codes": 32, "code_channels": 4}

    def stage(family: str) -> Path:
        if family not in made:
            torch.set_num_threads(1)
            section = {"model": family, "run": str(root / family), "steps": 1, "batch": 8, family: settings[family]}
            section |= {"watch": {"trackers": []}, "engine": {"strategy": "ddp", "threads": 1}}
            made[family] = Path(fit(Recipe(dataset=str(squares), train=section))["run"])
        return made[family]

    return stage


@pytest.fixture(scope="session")
def make(squares: Path, stages: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("dalle")

    def recipe(
        run: str, steps: int = 3, dalle: dict[str, Any] | None = None, *, stage: str = "vqgan", **section: Any
    ) -> Recipe:
        base = {"model": "dalle", "run": str(root / run), "steps": steps, "batch": 8, "lr": 3e-3, "log_every": 1}
        base |= {"ema": 0.5, "checkpoint": {"every": 1, "keep": 1}, "engine": {"strategy": "ddp", "threads": 1}}
        settings = SMALL | {"first_stage": str(stages(stage))} | (dalle or {})
        section["data"] = {"layer": None} | section.get("data", {})
        return Recipe(dataset=str(squares), train=base | {"watch": {"trackers": []}, "dalle": settings} | section)

    return recipe


@pytest.fixture(scope="session")
def run(make: Make) -> Path:
    torch.set_num_threads(1)
    return Path(fit(make("run"))["run"])
