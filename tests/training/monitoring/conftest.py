"""A tiny diffusion model that trains on squares in well under a second a run, as if they were the captioned world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clip import write_clip

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.models.autoencoder.family import AutoencoderFamily

SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
WORLD = {"format": "world", "world": {"scenes": 10, "size": 16}}


@pytest.fixture(scope="session")
def autoencoder(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained one: 16 pixels → latents [4, 8, 8]."""
    root = tmp_path_factory.mktemp("ae")
    train = TrainConfig.from_section({"model": "autoencoder", "run": "unused", "steps": 1, "autoencoder": SMALL})
    data = TrainingData(Dataset(Storage(str(squares))), train.data, 0, layer=None)
    for part in ("assets", "product"):
        (root / part).mkdir()
    torch.manual_seed(0)
    AutoencoderFamily.make_assets(train, data, root / "assets")
    family = AutoencoderFamily(train, root / "assets")
    family.save(family.model, root / "product")
    return root


class FewFeatures(torch.nn.Module):
    """uint8 [N, 3, H, W] → [N, 2]: the means of red and green; fewer features than any test has images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :2].float().flatten(2).mean(2)


@pytest.fixture(scope="session")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`clip` and `fid` of train.watch.evaluate."""
    root = tmp_path_factory.mktemp("metrics")
    torch.jit.script(FewFeatures()).save(str(root / "features.pt"))
    fid = {"features": str(root / "features.pt"), "trust_torchscript": True}
    return {"clip": {"model": str(write_clip(root / "clip", 0))}, "fid": fid}


@pytest.fixture(scope="session")
def recipe_in(squares: Path, autoencoder: Path) -> Callable[..., Recipe]:
    """`recipe_in(folder, name, watch={...}, key=value, ...)` trains in `folder / name`."""

    def make(folder: Path, run: str = "run", source: dict[str, Any] | None = WORLD, **section: Any) -> Recipe:
        base = {"model": "diffusion", "run": str(folder / run), "steps": 4, "batch": 8, "log_every": 1, "lr": 0.01}
        base |= {"ema": 0.5, "data": {"layer": None, "holdout": 4}, "warmup": 0, "engine": {"strategy": "ddp"}}
        base |= {"checkpoint": {"every": 4, "keep": 1}}
        base["diffusion"] = {
            "autoencoder": str(autoencoder),
            "unet": SMALL | {"heads": 2, "dropout": 0.1},
            "text": {"vocab_size": 600, "length": 24, "width": 16, "layers": 1, "heads": 2},
            "sampling": {"steps": 2, "guidance": 2.0},
        }
        rows = source or {"path": "rows.parquet"}
        return Recipe.model_validate({"dataset": str(squares), "source": rows, "train": {**base, **section}})

    return make


@pytest.fixture
def recipe(recipe_in: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe(name, watch={...}, key=value, ...)` trains in the folder `name`."""
    return lambda *names, **section: recipe_in(tmp_path, *names, **section)
