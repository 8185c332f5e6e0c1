"""A recipe of the test captioner, and what a dataset and its layers hold afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from capstan.pipeline.config import Recipe
from capstan.pipeline.storage import Storage

Build = Callable[..., Storage]
STEPS = [[0, 1, 2, 3], [4, 5, 6], [7]]


def recipe(captioner: Path, storage: Storage, workers: int = 1, **section: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "dataset": storage.url,
            "resources": {"cpus": 1, "model_workers": workers},
            "recaption": {"model": str(captioner), **section},
        }
    )


def tree(storage: Storage) -> dict[str, tuple[bytes, int]]:
    """Every file of the dataset, hidden ones too, with when it was written."""
    folder = Path(storage.url)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def layer_files(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in storage.names("captions")}
