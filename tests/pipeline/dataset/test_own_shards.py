"""A dataset of ours as the source of another, with `image.check: header`: its table says what is not measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn import drawing, file_of

from capstan.pipeline.build import build
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.source import SourceReader
from capstan.pipeline.storage import Storage

ROWS = 6
KEPT_FACTS = ["sha256", "phash", "colours", "bytes", "original_width", "original_height", "crop_left", "crop_top"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset of images that were made smaller, with scores."""
    folder = tmp_path_factory.mktemp("first")
    images = [file_of(drawing(seed, 160), "png") for seed in range(ROWS)]
    pq.write_table(pa.table({"image": images, "caption": [f"c {n}" for n in range(ROWS)]}), folder / "rows.parquet")
    source = {"path": str(folder / "rows.parquet"), "image": "image", "url": None}
    recipe = {"dataset": str(folder / "ds"), "source": source, "score": {"image": {}}, "image": {"size": 96}}
    build(Recipe.model_validate({**recipe, "dedup": {"exact": False, "perceptual": None}}), progress=False)
    return Dataset(Storage(str(folder / "ds")))


def recipe(first: Dataset, dataset: Path, **more: Any) -> Recipe:
    settings = {"dataset": str(dataset), "source": {"path": f"{first.storage.url}/shards"}}
    return Recipe.model_validate({**settings, "image": {"resize": "none", "check": "header"}, **more})


def test_images_and_what_was_measured_of_them_are_taken_over(first: Dataset, tmp_path: Path) -> None:
    shard = first.table("shard-000000")
    least = sorted(shard["image_sharpness"].to_pylist())[ROWS // 2]
    select = [{"name": "sharp", "where": f"(extra->>'$.image_sharpness')::DOUBLE >= {least}"}]
    summary = build(recipe(first, tmp_path / "ds", select=select), progress=False)
    assert summary["counts"]["kept"] == ROWS - ROWS // 2
    second = Dataset(Storage(str(tmp_path / "ds")))
    assert not verify(second.storage)
    before = {row["caption"]: row for row in shard.to_pylist()}
    images = dict(first.read_images("shard-000000"))
    copies = dict(second.read_images("shard-000000"))
    for row in second.table("shard-000000").to_pylist():
        original = before[row["caption"]]
        assert {name: row[name] for name in KEPT_FACTS} == {name: original[name] for name in KEPT_FACTS}
        assert copies[row["key"]] == images[original["key"]]
        assert row["phash"] != 0


def test_what_is_not_what_its_table_says_is_measured(first: Dataset, tmp_path: Path) -> None:
    """A table next to a tar that is of another image, is damaged, or is no shard's, says nothing."""
    shards = tmp_path / "shards"
    shards.mkdir()
    table = first.table("shard-000000")
    (shards / "a.tar").write_bytes(first.storage.read("shards/shard-000000.tar"))
    wrong = table.set_column(table.column_names.index("crc32"), "crc32", pa.array([1] * ROWS, pa.uint32()))
    pq.write_table(wrong, shards / "a.parquet")
    settings = recipe(first, tmp_path / "ds", source={"path": str(shards)}, dedup={"perceptual": None})
    assert build(settings, progress=False)["counts"]["kept"] == ROWS
    found = Dataset(Storage(str(tmp_path / "ds"))).table("shard-000000")
    assert found["phash"].to_pylist() == [0] * ROWS
    for content in (b"PAR1 no table", (shards / "a.parquet").read_bytes()[:-20]):
        (shards / "a.parquet").write_bytes(content)
        rows = [row for part in SourceReader(settings).tables() for row in part.to_pylist()]
        assert [row["facts"] for row in rows] == [""] * ROWS
