"""A recipe over drawn images in a table: some are no image, some repeat another, and each has a score; and what a
build of it publishes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capstan.pipeline import build as stages
from capstan.pipeline.config import Recipe
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage

Draw = Callable[[int], bytes]


def row(number: int, draw: Draw) -> dict[str, Any]:
    """Row 9, 19, ... is no image; 7, 15, 23, ... repeat image 0; `score` runs through 0 … 9."""
    image = b"no image" if number % 10 == 9 else draw(0 if number % 8 == 7 else number)
    return {"image": image, "caption": f"image {number}", "score": number % 10}


def rows_recipe(
    folder: Path, draw: Draw, count: int = 60, name: str = "dataset", least: int = 0, **sections: Any
) -> Recipe:
    """Write a table of `count` rows and return a recipe over it, with the dataset `name`, both in `folder`."""
    pq.write_table(pa.Table.from_pylist([row(n, draw) for n in range(count)]), folder / "rows.parquet")
    settings = {
        "dataset": str(folder / name),
        "source": {"path": str(folder / "rows.parquet"), "image": "image"},
        "image": {"size": 64},
        "select": [{"name": "score", "where": f"(extra->>'$.score')::int >= {least}"}],
        "unit": {"rows": 16},
        "shards": {"samples": 15},
    }
    return Recipe.model_validate(settings | sections)


def build(recipe: Recipe) -> dict[str, Any]:
    return stages.build(recipe, progress=False)


def published(recipe: Recipe) -> dict[str, bytes]:
    """What readers see: all but staged images and state."""
    storage = Storage(recipe.dataset)
    hidden = ("state/", "staged/")
    return {name: storage.read(name) for name in storage.names() if not name.startswith(hidden)}


def sound(recipe: Recipe) -> bool:
    return verify(Storage(recipe.dataset)) == []
