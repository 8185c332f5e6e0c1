"""From the recipe to the samples of a run: one dataset or several, with their layers, pinned once per run."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from repo import HELPERS
from small_dataset import as_if_a_model_wrote_it

from capstan.cluster.cli import run as main
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption.store import write_given_layer
from capstan.training.config import Data, TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.data.mixture import MixedData
from capstan.training.data.sources import find_layer, weighted_datasets
from capstan.training.run import Run
from capstan.training.run_data import open_data, pin
from capstan.training.trainer import fit


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HELPERS))


@pytest.fixture
def drawings(make_dataset, tmp_path: Path) -> Path:
    """A second dataset, with a caption layer of its own."""
    folder = make_dataset(tmp_path / "drawings", [10, 6])
    dataset = Dataset(Storage(str(folder)))
    keys = [key for shard in dataset.shard_names for key in dataset.table(shard, ["key"])["key"].to_pylist()]
    write_given_layer(dataset.storage, "own", {key: {"descriptive": "a drawing"} for key in keys})
    return folder


def make_recipe(squares: Path, run: Path, **data: Any) -> Recipe:
    train = {"model": "tiny_family:TinyFamily", "run": str(run), "steps": 10, "batch": 8, "log_every": 5}
    train |= {"data": {"layer": None, **data}, "engine": {"strategy": "ddp"}, "checkpoint": {"every": 5}}
    return Recipe(dataset=str(squares), train=train)


def test_a_mixture_is_logged_and_kept_in_the_checkpoint(squares: Path, drawings: Path, tmp_path: Path) -> None:
    two = [{"dataset": str(squares), "weight": 0.75}, {"dataset": str(drawings), "weight": 0.25, "layer": "own"}]
    recipe = make_recipe(squares, tmp_path / "run", datasets=two)
    fit(recipe)
    record = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()][-1]
    assert {name: record[name] for name in ("mix/ds", "mix/drawings")} == {"mix/ds": 0.75, "mix/drawings": 0.25}
    assert record["epoch/drawings"] == 20 / 16
    assert record["blend"]["descriptive"] == pytest.approx(0.25, abs=0.06)  # 95% of a quarter
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-000010" / "checkpoint.json").read_text())
    assert saved["progress"]["mix/ds"] == 0.75
    assert saved["data"]["drawings"]["layer"] == "own"


def test_what_is_meant_by_latest_does_not_move_under_a_run(squares: Path, drawings: Path, tmp_path: Path) -> None:
    two = [{"dataset": str(squares)}, {"dataset": str(drawings), "layer": "latest"}]
    recipe = make_recipe(squares, tmp_path / "run", datasets=two)
    train = TrainConfig.from_recipe(recipe)
    run = Run(train)
    run.open(recipe.model_dump(mode="json"))
    pin(recipe, train, run)
    write_given_layer(Storage(str(drawings)), "later", {})
    pin(recipe, train, run)
    data = open_data(recipe, train, run)
    assert isinstance(data, MixedData)
    assert [part.layer for part in data.parts] == [None, "own"]
    counts = Counter(data.at(number).text == "a drawing" for number in range(64))
    assert 25 <= counts[True] <= 32


def test_a_run_trains_on_corrections_and_on_what_they_leave(squares: Path, tmp_path: Path) -> None:
    """`capstan train` with a layer that lies over a model's: `latest`, as the corrections came last."""
    storage = Storage(str(shutil.copytree(squares, tmp_path / "ds")))
    shards = Dataset(storage).shard_names
    keys = [key for shard in shards for key in Dataset(storage).table(shard, ["key"])["key"].to_pylist()]
    write_given_layer(storage, "model", {key: {"descriptive": "as a model saw it"} for key in keys})
    as_if_a_model_wrote_it(storage, "model")
    write_given_layer(storage, "mine", {keys[0]: {"descriptive": "as a person saw it"}}, over="model")
    recipe = make_recipe(Path(storage.url), tmp_path / "run", layer="latest", blend={"descriptive": 1})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    few = ["--set", "train.steps=2", "--set", "train.engine.launcher=local"]
    assert main(["train", str(tmp_path / "recipe.yaml"), *few]) == 0
    pinned = json.loads((tmp_path / "run" / "pinned.json").read_text())
    assert "mine" in pinned.values()
    (learnt,) = (tmp_path / "run").rglob("captions.json")
    assert set(json.loads(learnt.read_text())) == {"as a model saw it", "as a person saw it"}
    storage.delete(f"captions/model/{shards[-1]}.parquet")
    with pytest.raises(RecipeError, match=f"layer model has no captions of {shards[-1]}"):
        find_layer(storage, Data(layer="mine"))


def test_one_dataset_is_the_recipes_own(squares: Path, tmp_path: Path) -> None:
    recipe = make_recipe(squares, tmp_path / "run")
    train = TrainConfig.from_recipe(recipe)
    run = Run(train)
    run.open(recipe.model_dump(mode="json"))
    pin(recipe, train, run)
    data = open_data(recipe, train, run)
    assert isinstance(data, TrainingData)
    assert data.progress(96) == {"epoch": 1.5}
    assert [source.dataset for source in weighted_datasets(recipe, train)] == [str(squares)]


@pytest.mark.parametrize(
    ("data", "field", "words"),
    [
        ({"datasets": [{"dataset": "/nowhere"}]}, "train.data.datasets", "no dataset at /nowhere"),
        ({"datasets": []}, "train.data.datasets", "at least 1 item"),
        ({"datasets": [{"dataset": "x", "weight": 0}]}, "train.data.datasets.0.weight", "greater than 0"),
        ({"buckets": {"size": 512}}, "train.data.buckets", "tiny supports squares only"),
        ({"buckets": {}}, "train.data.buckets", "set either sizes, or size"),
        ({"buckets": {"size": 500}}, "train.data.buckets", "does not divide by step 64"),
        ({"buckets": {"sizes": [[1, 1], [2, 2]]}}, "train.data.buckets", "the same aspect ratio"),
        ({"cache": {"folder": "x"}}, "train.data.cache.gib", "is missing"),
    ],
)
def test_a_mistake_is_named_with_its_fix(
    squares: Path, tmp_path: Path, data: dict[str, Any], field: str, words: str
) -> None:
    def begin() -> None:
        recipe = make_recipe(squares, tmp_path / "run", **data)
        train = TrainConfig.from_recipe(recipe)
        pin(recipe, train, Run(train))

    with pytest.raises(RecipeError, match=words) as error:
        begin()
    assert error.value.field == field
