"""What is lost or damaged is made again, from whatever still holds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import run_all_here

from capstan.pipeline import build as stages
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.damage import noted_damage
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog

Make = Callable[..., Recipe]
IMAGES = 12


@pytest.fixture
def images(tmp_path: Path, draw: Callable[[int], bytes]) -> Path:
    """A folder of IMAGES images with captions 0, 1, …"""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(IMAGES):
        (folder / f"{number}.jpg").write_bytes(draw(number))
        (folder / f"{number}.txt").write_text(str(number))
    return folder


@pytest.fixture
def make(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A recipe over the folder in two units, keeping those whose number is at least `least`."""
    for module in ("build", "pack.job"):
        monkeypatch.setattr(f"capstan.pipeline.{module}.run", run_all_here)

    def recipe(least: int = 2, *, keep: bool = True) -> Recipe:
        settings = {
            "dataset": str(tmp_path / "ds"),
            "source": {"path": str(images), "format": "folder"},
            "image": {"size": 64, "min_size": 8},
            "select": [{"name": "least", "where": f"caption::int >= {least}"}],
            "dedup": {"perceptual": None, "exact": False},
            "unit": {"rows": 6},
            "shards": {"samples": 4},
            "keep_staged": keep,
        }
        return Recipe.model_validate(settings)

    return recipe


def build(recipe: Recipe) -> dict[str, Any]:
    return stages.build(recipe, progress=False)


def content(storage: Storage) -> dict[str, bytes]:
    """All that a dataset promises, and what is staged."""
    names = [name for folder in ("shards", "ledger", "staged") for name in storage.names(folder)]
    return {name: storage.read(name) for name in [*names, "dataset.json"]}


def flip(storage: Storage, name: str, share: float = 0.5) -> None:
    data = bytearray(storage.read(name))
    data[int(len(data) * share)] ^= 1
    storage.write(name, bytes(data))


def first(storage: Storage, folder: str, suffix: str) -> str:
    return next(name for name in storage.names(folder) if name.endswith(suffix))


@pytest.mark.parametrize(
    ("folder", "suffix"),
    [("staged", ".tar"), ("staged", ".parquet"), ("shards", ".tar"), ("shards", ".parquet"), ("shards", ".idx"),
     ("ledger", ".parquet")],
)  # fmt: skip
def test_what_is_deleted_is_made_again_by_the_next_build(make: Make, folder: str, suffix: str) -> None:
    build(make())
    storage = Storage(make().dataset)
    before = content(storage)
    storage.delete(first(storage, folder, suffix))
    assert build(make())["counts"]["kept"] == 10
    assert verify(storage) == []
    assert content(storage) == before


@pytest.mark.parametrize(
    ("folder", "suffix"),
    [("staged", ".tar"), ("staged", ".parquet"), ("shards", ".tar"), ("shards", ".parquet"), ("shards", ".idx"),
     ("ledger", ".parquet"), ("", "sizes.json"), ("", "dataset.json")],
)  # fmt: skip
def test_what_is_damaged_is_made_again_by_verify_repair(make: Make, folder: str, suffix: str) -> None:
    build(make())
    storage = Storage(make().dataset)
    before = content(storage)
    name = first(storage, folder, suffix)
    flip(storage, name, 0.4 if suffix != "dataset.json" else 0.0)
    if suffix == "dataset.json":
        storage.write(name, before[name].replace(b'"kept": 10', b'"kept": 11'))
    problems = verify(storage)
    assert any(problem.startswith(name) for problem in problems)
    summary = stages.repair(storage.url, progress=False)
    assert summary["repaired"] == problems
    assert (summary["ok"], summary["problems"], summary["lost"]) == (True, [], 0)
    assert content(storage) == before
    assert noted_damage(storage) == set()


@pytest.mark.parametrize("before", ["nothing", "select"])
def test_damage_that_packing_meets_is_repaired_by_the_build(make: Make, before: str) -> None:
    build(make())
    storage = Storage(make().dataset)
    build(make(least=3))
    whole = content(storage)
    build(make())
    for tar in [name for name in storage.names("staged") if name.endswith(".tar")]:
        for share in range(5, 100, 5):
            flip(storage, tar, share / 100)
    if before == "select":
        assert stages.select(make(least=3), progress=False)["quarantined"]
        assert noted_damage(storage)
    assert build(make(least=3))["quarantined"] == {}
    assert noted_damage(storage) == set()
    assert all(problem.startswith("staged/") for problem in verify(storage)), "of what packing did not read"
    assert stages.repair(storage.url, progress=False)["ok"]
    assert content(storage) == whole


def test_a_lost_staged_tar_takes_nothing_out_of_the_shards(make: Make) -> None:
    """The source is gone: the shards hold what is kept."""
    build(make())
    storage = Storage(make().dataset)
    storage.delete(*(name for name in storage.names("staged") if name.endswith(".tar")))
    assert stages.select(make(least=4), progress=False)["counts"]["kept"] == 8
    assert verify(storage) == [f"{name}: missing" for name in sorted(_named_tars(storage))]


def _named_tars(storage: Storage) -> list[str]:
    from capstan.pipeline.units import MarkerLog

    job = next(name.split("/")[1] for name in storage.names("state") if name.startswith("state/ingest-"))
    return [mark["tar"] for mark in MarkerLog(storage, job).read().values()]


@pytest.mark.parametrize("source", ["there", "gone"])
def test_without_staged_images_a_damaged_shard_comes_from_the_source(make: Make, images: Path, source: str) -> None:
    build(make(keep=False))
    storage = Storage(make().dataset)
    before = {name: data for name, data in content(storage).items() if name.startswith("shards/")}
    shard = Dataset(storage).shard_names[0]
    place = storage.read_table(f"shards/{shard}.parquet").to_pylist()[1]
    flip(storage, f"shards/{shard}.tar", (place["offset"] + 100) / storage.size(f"shards/{shard}.tar"))
    if source == "gone":
        for file in images.glob("*.jpg"):
            file.unlink()
    summary = stages.repair(storage.url, progress=False)
    assert summary["ok"]
    assert summary["lost"] == (source == "gone")
    after = {name: data for name, data in content(storage).items() if name.startswith("shards/")}
    if source == "there":
        assert after == before
    else:  # the damaged image is lost, and no other
        keys = {row["key"] for name in Dataset(storage).shard_names for row in Dataset(storage).table(name).to_pylist()}
        assert len(keys) == 9
        assert place["key"] not in keys


def test_damaged_captions_and_latents_are_forgotten_and_captions_of_people_are_named(make: Make) -> None:
    recipe = make()
    build(recipe)
    storage = Storage(recipe.dataset)
    shard = Dataset(storage).shard_names[0]
    before = content(storage)
    made, encoded, written = (
        f"captions/{'a' * 16}/{shard}.parquet",
        f"latents/enc/{shard}.safetensors",
        f"captions/people/{shard}.parquet",
    )
    for name in (made, encoded, written):
        storage.write(name, b"damaged")
    MarkerLog(storage, f"recaption-{'a' * 16}").mark(shard, {})
    summary = stages.repair(storage.url, progress=False)
    assert not summary["ok"]
    assert [line.partition(": ")[0] for line in summary["problems"]] == [written]
    assert [line.partition(": ")[0] for line in summary["forgotten"]] == [made, encoded]
    assert summary["repaired"] == []
    assert not storage.exists(made)
    assert not storage.exists(encoded)
    assert storage.exists(written)
    assert content(storage) == before
