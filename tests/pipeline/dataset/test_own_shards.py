"""A dataset of ours as the source of another, with `image.check: header`: its table says what is not measured again."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn import drawing, file_of

from capstan.pipeline.build import build, remove
from capstan.pipeline.config import Blocklist, Recipe
from capstan.pipeline.dataset.own_shards import own_rows, own_table
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.source import SourceReader
from capstan.pipeline.source.folders import by_table, is_read_by_table, webdataset
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.listing import SourceFile
from capstan.pipeline.storage.local import Local

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


def test_a_table_says_what_the_members_of_its_tar_say(first: Dataset, tmp_path: Path) -> None:
    settings = recipe(first, tmp_path / "ds")
    assert settings.source is not None
    entry = first.manifest.shards[0]
    file = SourceFile(f"{first.storage.url}/{entry.tar}", entry.bytes, "")
    table = own_table(file.path, file.size, Local().open)
    assert table is not None
    assert is_read_by_table(table, settings.source)
    rows = list(webdataset(file, settings.source, Local().open, Counter(), own_rows(table)))
    found = by_table(file, table, settings.source).to_pylist()
    for row, read in zip(found, rows, strict=True):
        assert json.loads(row.pop("facts")) == json.loads(read.facts)
        assert row == {name: getattr(read, name) for name in row}


LIES = {
    "sha256": ["../../x" + "0" * 57] * ROWS,
    "key": ["0" * 32] * ROWS,
    "width": [0] * ROWS,
    "size": [2**40] * ROWS,
    "offset": [512] * ROWS,
    "colours": ["short"] * ROWS,
}


@pytest.mark.parametrize("name", LIES)
def test_a_table_that_cannot_be_the_tars_is_not_used(first: Dataset, name: str) -> None:
    table, size = first.table("shard-000000"), first.manifest.shards[0].bytes

    def opened(lying: pa.Table) -> pa.Table | None:
        buffer = io.BytesIO()
        pq.write_table(lying, buffer)
        return own_table("a.tar", size, lambda _: io.BytesIO(buffer.getvalue()))

    number = table.column_names.index(name)
    assert opened(table) is not None
    assert opened(table.set_column(number, name, pa.array(LIES[name], table.schema.types[number]))) is None
    assert opened(table.slice(1)) is None


def test_an_image_that_its_table_lies_about_is_read_again(first: Dataset, tmp_path: Path) -> None:
    """A JPEG without its end, with the CRC-32 that its table says, fails; a size that is not the image's is measured.

    Both are found when they are packed, and the unit is then read as if its table said nothing.
    """
    shards = tmp_path / "shards"
    shards.mkdir()
    table, tar = first.table("shard-000000"), bytearray(first.storage.read("shards/shard-000000.tar"))
    rows = table.to_pylist()
    cut, wide = rows[1], rows[3]
    stop = cut["offset"] + cut["size"]
    tar[stop - 200 : stop] = bytes(200)
    cut["crc32"] = zlib.crc32(tar[cut["offset"] : stop])
    wide["width"] *= 2
    (shards / "a.tar").write_bytes(tar)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), shards / "a.parquet")
    settings = recipe(first, tmp_path / "ds", source={"path": str(shards)}, dedup={"perceptual": None})
    counts = build(settings, progress=False)["counts"]
    assert (counts["kept"], counts["failed"]) == (ROWS - 1, 1)
    second = Dataset(Storage(str(tmp_path / "ds")))
    assert not verify(second.storage)
    ledger = {row["caption"]: row for row in second.ledger().to_pylist()}
    assert ledger[cut["caption"]]["reason"] == "truncated"
    assert not second.storage.names("state/damaged")


def test_images_stay_in_the_source_until_they_are_packed(first: Dataset, tmp_path: Path) -> None:
    """Nothing is copied to staged/. Without the source, fewer rows are packed again, and rows removed, from shards."""
    shards, target = tmp_path / "shards", tmp_path / "ds"
    shutil.copytree(f"{first.storage.url}/shards", shards)
    settings = recipe(first, target, source={"path": str(shards)}, dedup={"perceptual": None})
    build(settings, progress=False)
    assert not [name for name in Storage(str(target)).names("staged") if name.endswith(".tar")]
    whole = dict(Dataset(Storage(str(target))).read_images("shard-000000"))
    gone = sorted(whole)[2]
    (tmp_path / "keys.txt").write_text(gone)
    shutil.rmtree(shards)
    remove(str(target), Blocklist(keys=str(tmp_path / "keys.txt")), progress=False)
    left = Dataset(Storage(str(target)))
    assert not verify(left.storage)
    assert dict(left.read_images("shard-000000")) == {key: data for key, data in whole.items() if key != gone}
    tables = [left.storage.read_table(name) for name in left.storage.names("staged")]
    sources = {row["key"]: row["source"] for table in tables for row in table.to_pylist()}
    assert {key for key, source in sources.items() if not source} == {gone}
