"""Texts of a row are bounded: a long caption fails its row alone, other long columns are left out."""

import base64
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import run_all_here

from capstan.pipeline import build as stages
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.source.bounds import MOST_TEXT, MOST_URL
from capstan.pipeline.storage import Storage

LONG = "a cat " * (MOST_TEXT // 6 + 1)
Build = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Build a dataset of a source; return its ledger, by key."""
    for module in ("build", "pack.job"):
        monkeypatch.setattr(f"capstan.pipeline.{module}.run", run_all_here)

    def run(**source: Any) -> list[dict[str, Any]]:
        settings = {"dataset": str(tmp_path / "ds"), "source": source, "image": {"size": 64, "min_size": 8}}
        stages.build(Recipe.model_validate(settings | {"dedup": {"perceptual": None}}), progress=False)
        return Dataset(Storage(str(tmp_path / "ds"))).ledger().to_pylist()

    return run


def check(rows: list[dict[str, Any]]) -> None:
    """Three rows: a plain one, one with a long caption, one with other long columns."""
    assert sorted((row["outcome"], row["reason"]) for row in rows) == [
        ("failed", "bad_caption"),
        ("kept", ""),
        ("kept", ""),
    ]
    (failed,) = (row for row in rows if row["outcome"] == "failed")
    assert failed["detail"].startswith("a caption of 1,0")
    assert len(failed["caption"]) <= 200
    (cut,) = (row for row in rows if "oversized_extra" in row["extra"])
    assert cut["outcome"] == "kept"
    assert json.loads(cut["extra"])["oversized_extra"] > MOST_TEXT


def test_a_table(tmp_path: Path, draw: Callable[[int], bytes], build: Build) -> None:
    rows = [
        {"image": draw(n), "caption": LONG if n == 1 else "a cat", "other": LONG if n == 2 else "x"} for n in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    check(build(path=str(tmp_path / "rows.parquet"), image="image"))


def write_samples(folder: Path, draw: Callable[[int], bytes]) -> None:
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(draw(n))
        (folder / f"{n}.txt").write_text(LONG if n == 1 else "a cat")
        (folder / f"{n}.json").write_text(json.dumps({"other": LONG if n == 2 else "x"}))


def test_a_folder(tmp_path: Path, draw: Callable[[int], bytes], build: Build) -> None:
    write_samples(tmp_path / "in", draw)
    check(build(path=str(tmp_path / "in"), format="folder"))


def test_a_tar(tmp_path: Path, draw: Callable[[int], bytes], build: Build) -> None:
    write_samples(tmp_path / "in", draw)
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for path in sorted((tmp_path / "in").iterdir()):
            tar.add(path, path.name)
    check(build(path=str(tmp_path / "in.tar")))


def test_a_url_and_a_data_uri(tmp_path: Path, draw: Callable[[int], bytes], build: Build) -> None:
    inline = "data:image/jpeg;base64," + base64.b64encode(draw(5)).decode()
    urls = ["http://x/" + "a" * MOST_URL, inline, inline.replace("data:", " DATA:"), "data:,nothing"]
    pq.write_table(pa.table({"url": urls, "caption": list("abcd")}), tmp_path / "rows.parquet")
    rows = sorted(build(path=str(tmp_path / "rows.parquet")), key=lambda row: row["caption"])
    assert [row["reason"] for row in rows if row["outcome"] == "failed"] == ["bad_url", "not_an_image"]
    assert {row["outcome"] for row in rows[1:3]} <= {"kept", "duplicate"}
    assert len({row["key"] for row in rows}) == 4
    assert all(len(row["url"]) < 300 for row in rows)
