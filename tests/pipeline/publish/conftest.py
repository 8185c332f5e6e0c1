"""A dataset to publish: kept, rejected and failed rows with private URLs, licences, and a caption layer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows_recipe import build, row, rows_recipe

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.storage import Storage

LAYER = {"layer": "mine", "number": 0, "slots": ["short"], "lint": {}, "engine": {"engine": "given"}}
PRIVATE = "https://intranet.example/rejected"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, draw: Callable[[int], bytes]) -> Path:
    folder = tmp_path_factory.mktemp("publish")
    rows = [row(n, draw) for n in range(24)]
    for n, one in enumerate(rows):
        one |= {"rights": ["CC BY 4.0", "cc0"][n % 2], "url": f"{PRIVATE}/{n}" if one["score"] < 3 else ""}
    pq.write_table(pa.Table.from_pylist(rows), folder / "licensed.parquet")
    source = {"path": str(folder / "licensed.parquet"), "image": "image", "license": "rights"}
    recipe = rows_recipe(folder, draw, 1, least=3, source=source, shards={"samples": 6})
    build(recipe)
    storage = Storage(recipe.dataset)
    dataset = Dataset(storage)
    for name in dataset.shard_names:
        keys = [*dataset.table(name)["key"].to_pylist(), "0" * 32]  # the last one is of an image that left the shard
        layer = {"key": keys, "slot": ["short"] * len(keys), "text": ["a drawing"] * len(keys)}
        storage.write_table(f"captions/mine/{name}.parquet", pa.table(layer))
    storage.write("captions/mine/recipe.json", json.dumps(LAYER).encode())
    return Path(recipe.dataset)


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Storage:
    """A copy that a test may change."""
    shutil.copytree(built, tmp_path / "dataset")
    return Storage(str(tmp_path / "dataset"), field="DATASET")
