"""`build --retry`: only failed rows are fetched again; the others are carried over, whatever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from capstan.pipeline import build as stages
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.ingest.retry_rows import matches, parse_reasons
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage

COUNT = 24
MISSING = {f"/{n}.jpg": 404 for n in range(0, COUNT, 8)}
BUSY = {f"/{n}.jpg": 503 for n in range(1, COUNT, 2)}


def test_reasons_are_parsed() -> None:
    assert parse_reasons("timeout, http_503,timeout") == ["http_503", "timeout"]
    assert parse_reasons("failed") == ["failed"]
    assert matches("http_404", ["failed"])
    assert not matches("", ["failed"])
    assert not matches("http_404", ["http_503"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timeuot", "--retry: 'timeuot' is not a failure reason. Fix: did you mean timeout"),
        ("timeout,http503", "--retry: 'http503' .*did you mean http_503"),
        ("Failed", "did you mean failed"),
        ("qqqq", "use failed for all, or any of failed, bad_caption"),
        ("", "--retry: names no reason"),
    ],
)
def test_an_unknown_reason_is_refused_with_the_nearest_ones(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_reasons(text)


def settings(folder: Path, site: Any, count: int = COUNT) -> dict[str, Any]:
    table = folder.parent / "urls.jsonl"
    table.write_text("\n".join(json.dumps({"url": site.url(n), "caption": f"image {n}"}) for n in range(count)))
    return {
        "dataset": str(folder),
        "source": {"path": str(table)},
        "fetch": {"allow_private": True, "retries": 0, "concurrency": 2},
        "image": {"size": 64},
        "unit": {"rows": 8},
        "shards": {"samples": 10},
        "resources": {"cpus": 1},
    }


def published(folder: Path) -> dict[str, bytes]:
    storage = Storage(str(folder))
    return {name: storage.read(name) for name in storage.names() if not name.startswith(("state/", "staged/"))}


def images(folder: Path) -> dict[str, bytes]:
    dataset = Dataset(Storage(str(folder)))
    return dict(image for shard in dataset.shard_names for image in dataset.read_images(shard))


def failed(folder: Path) -> set[str]:
    """The paths of the rows that failed."""
    ledger = Dataset(Storage(str(folder))).ledger(["url", "outcome"]).to_pylist()
    return {"/" + row["url"].rpartition("/")[2] for row in ledger if row["outcome"] == "failed"}


@pytest.mark.integration
def test_only_rows_that_failed_for_these_reasons_are_fetched_again(
    tmp_path: Path, site: Any, two_cpus: Resources
) -> None:
    folder = tmp_path / "dataset"
    recipe = Recipe.model_validate(settings(folder, site))
    site.broken = MISSING | BUSY
    first = stages.build(recipe, progress=False)
    assert first["failed"] == {"http_503": len(BUSY), "http_404": len(MISSING)}
    assert len(site.new_asked()) == COUNT
    before = images(folder)

    site.broken = MISSING
    healed = stages.build(recipe, retry="http_503", progress=False)
    assert site.new_asked() == sorted(BUSY)
    assert healed["retried"] == len(BUSY)
    assert healed["failed"] == {"http_404": len(MISSING)}
    after = images(folder)
    assert len(after) == len(before) + len(BUSY)
    assert before.items() <= after.items()
    assert verify(Storage(str(folder))) == []

    fresh = tmp_path / "fresh"
    stages.build(Recipe.model_validate(settings(fresh, site)), progress=False)
    assert published(folder) == published(fresh)
    site.new_asked()

    for _ in range(2):  # rows that fail again can be retried again
        assert stages.build(recipe, retry="failed", progress=False)["failed"] == {"http_404": len(MISSING)}
        assert site.new_asked() == sorted(MISSING)
    assert published(folder) == published(fresh)

    assert stages.build(recipe, retry="timeout", progress=False)["retried"] == 0
    stages.build(recipe, progress=False)
    assert site.new_asked() == []
    staged = Storage(str(folder)).names("staged")
    assert len(staged) == 2 * COUNT // 8  # the old files are gone


@pytest.mark.integration
def test_measures_of_the_rows_that_stay_are_carried_over(tmp_path: Path, site: Any, two_cpus: Resources) -> None:
    folder = tmp_path / "dataset"
    recipe = Recipe.model_validate(settings(folder, site))
    site.broken = dict(BUSY)
    stages.build(recipe, progress=False)

    def rows() -> dict[str, dict[str, Any]]:
        tables = [pq.read_table(path) for path in sorted((folder / "staged").glob("*.parquet"))]
        return {row["key"]: row for table in tables for row in table.to_pylist()}

    before = rows()
    site.broken = dict.fromkeys(BUSY, 404)
    stages.build(recipe, retry="failed", progress=False)
    after = rows()
    changed = {key for key in before if before[key]["reason"] != after[key]["reason"]}
    assert len(changed) == len(BUSY)
    assert {after[key]["reason"] for key in changed} == {"http_404"}
    for key in before.keys() - changed:
        assert before[key] == after[key]


@pytest.mark.integration
def test_a_unit_without_its_staged_files_is_rebuilt_from_the_shards(
    tmp_path: Path, site: Any, two_cpus: Resources
) -> None:
    folder = tmp_path / "dataset"
    recipe = settings(folder, site)
    build(recipe)
    before = images(folder)
    site.new_asked()
    unit = sorted((folder / "staged").glob("*.parquet"))[0].name.rpartition("-")[0]
    for file in (folder / "staged").glob(f"{unit}-*"):
        file.unlink()
    build(recipe | {"select": [{"name": "size", "where": "width > 1"}]})
    assert site.new_asked() == []  # ledger and shards hold what the unit held
    assert images(folder) == before
    assert verify(Storage(str(folder))) == []


SCRIPT = """
import json, sys
from capstan.pipeline.config import Recipe
from capstan.pipeline.build import build
print(json.dumps(build(Recipe.model_validate_json(sys.argv[1]), retry=sys.argv[2] or None)))
"""


def start(recipe: dict[str, Any], retry: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, json.dumps(recipe), retry]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def build(recipe: dict[str, Any], retry: str | None = None) -> dict[str, Any]:
    return stages.build(Recipe.model_validate(recipe), retry=retry, progress=False)


def test_a_killed_retry_resumes_and_a_plain_build_after_it_is_sound(
    tmp_path: Path, site: Any, two_cpus: Resources
) -> None:
    folder, plain = tmp_path / "dataset", tmp_path / "plain"
    recipe = settings(folder, site)
    site.broken = MISSING | BUSY
    build(recipe)
    site.new_asked()

    site.broken, site.slow_s = MISSING, 0.3
    process = start(recipe, "failed")
    deadline = time.monotonic() + 300
    marks = list((folder / "state").glob("ingest-*/done/*.json"))
    while not (done := [mark for mark in marks if "round" in json.loads(mark.read_bytes())]):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(1.0)  # workers outlive the driver for a moment
    site.slow_s = 0.0
    site.new_asked()
    done = [mark for mark in marks if "round" in json.loads(mark.read_bytes())]
    assert len(done) < len(marks)
    shutil.copytree(folder, plain)

    summary = build(recipe, "failed")
    asked = site.new_asked()
    again = {f"/{row['url'].rpartition('/')[2]}" for mark in done for row in planned(folder, mark.stem)}
    assert asked
    assert not again & set(asked)
    assert summary["failed"] == {"http_404": len(MISSING)}
    assert failed(folder) == set(MISSING)

    partly = build(recipe | {"dataset": str(plain)})
    assert site.new_asked() == []
    assert verify(Storage(str(plain))) == []
    assert len(MISSING) < sum(partly["failed"].values()) < len(MISSING) + len(BUSY)
    whole = build(recipe | {"dataset": str(plain)}, "failed")
    assert set(site.new_asked()) == set(MISSING) | set(asked)
    assert whole["counts"] == summary["counts"]
    assert published(plain) == published(folder)


def planned(folder: Path, unit: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / "state" / "plan" / f"batch-{unit[:4]}" / f"unit-{unit}.parquet").to_pylist()
