"""What the tests of this folder share."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save
from takedowns import ROWS, Draw, key_of, layers, recipe_for, row

from capstan.pipeline import build
from capstan.pipeline.config import Resources
from capstan.pipeline.storage import Storage


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, two_cpus: Resources, draw: Draw) -> Path:
    folder = tmp_path_factory.mktemp("built")
    pq.write_table(pa.Table.from_pylist([row(draw, number) for number in range(ROWS)]), folder / "rows.parquet")
    recipe = recipe_for(folder)
    assert build.build(recipe, progress=False)["counts"]["kept"] == ROWS - 1
    layers(Storage(recipe.dataset))
    storage = Storage(recipe.dataset)
    # What else is made of a dataset: a report, a comparison of layers, a layer that is moving, latents of a shard as it
    # was once, and what is left on the shelf by packing that was killed at its very end.
    for name in ("report.html", "samples.png", "captions/diff-a-b.html", "captions/diff-a-b.png", "shelf/0.tar"):
        storage.write(name, b"<p>words-05 of a person")
    moving = pa.table({"key": [key_of(storage, 5), key_of(storage, 6)], "raw": ["words-05", "words-06"]})
    storage.write_table("captions/mine/aside/part.parquet", moving)
    old = save({"latents": np.zeros((3, 1, 1, 1), np.float16)}, metadata={"shard_sha256": "0" * 64})
    for shard in ("shard-000000", "shard-000099"):
        storage.write(f"latents/old/{shard}.safetensors", old)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"
