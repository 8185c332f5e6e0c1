"""An experiment goes through its points, goes on where it stopped, and says what was found, whatever that is.

The trainer is a stand-in that leaves what a run leaves, and images score as often as their arm is told to: so what
there is to be found is known. The real ones run in tests/cluster/test_experiment.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset, sha256_of, write_manifest
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.render import render
from capstan.pipeline.world.scene import draw_scene, vocabulary
from capstan.pipeline.world.table import url_of
from capstan.recaption.store import write_given_layer
from capstan.training.config import TrainConfig
from capstan.training.drawing.drawer import Drawn
from capstan.training.experiment import run as experiment
from capstan.training.experiment.measure import Values, measure, references
from capstan.training.experiment.prompts import Prompts, world_of
from capstan.training.run import Run

SOURCE = {"format": "world", "world": {"size": 32, "textures": ["plain"]}}
RIGHT = {"original": 0.1, "short95": 0.4, "descriptive95": 0.8}  # how often each arm draws what is asked


class Stage:
    """What the stand-ins do, and what was asked of them."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, int]] = []
        self.right = dict(RIGHT)
        self.stop_at: tuple[str, int] | None = None

    def train(self, recipe: Recipe) -> dict[str, Any]:
        config = TrainConfig.from_recipe(recipe)
        run = Run(config)
        run.open(recipe.model_dump(mode="json"))
        if finished := run.finished():
            return finished
        if self.stop_at == (run.folder.name, config.steps):
            self.stop_at = None
            raise KeyboardInterrupt
        self.trained.append((run.folder.name, config.steps))
        record = {"samples": config.steps * config.batch, "images_per_s": 100.0, "blend": config.data.weights}
        with run.log.open("a") as log:
            log.write(json.dumps({"step": config.steps, **record}) + "\n")
        run.product.mkdir(exist_ok=True)
        summary = {"steps": config.steps}
        run.finish(summary)
        return summary

    def open_sampler(self, folder: Path) -> Stage:
        self.arm, _, self.seed = folder.name.partition("-s")
        return self

    def measure(self, sampler: Stage, sets: Prompts, clip: None) -> tuple[Values, dict[str, np.ndarray]]:
        """In place of drawing and judging: right or wrong, by the arm's own odds."""
        chance = np.random.default_rng(int(self.seed))
        values: Values = {}
        for name, prompts in sets.items():
            right = (chance.random(len(prompts)) < self.right[self.arm]).astype(float).tolist()
            values[name] = dict.fromkeys(("followed", "count"), right)
        return values, {name: np.zeros((8, 32, 32, 3), np.uint8) for name in sets}

    def draw(self, texts: Sequence[str], seeds: Sequence[int], *, batch: int) -> Drawn:
        world = world_of(Recipe(dataset="ds", source=SOURCE))
        assert world is not None
        vocab, chance = vocabulary(world), np.random.default_rng(int(self.seed))
        right = chance.random(len(texts)) < self.right[self.arm]
        shift = np.where(right, 0, 10_000)
        scenes = [draw_scene(8_641_000_001, seed + int(s), vocab) for seed, s in zip(seeds, shift, strict=True)]
        return Drawn("image", np.stack([render(scene, 32) for scene in scenes]))


def _move(storage: Storage, name: str, first: int) -> None:
    """Give the rows of a shard's table addresses of the world."""
    world, table = world_of(Recipe(dataset="ds", source=SOURCE)), storage.read_table(name)
    assert world is not None
    urls = pa.array([url_of(world, first + row) for row in range(len(table))])
    storage.write_table(name, table.set_column(table.column_names.index("url"), table.schema.field("url"), urls))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    import capstan.training.sample

    there = Stage()
    monkeypatch.setattr(experiment, "train", there.train)
    monkeypatch.setattr(experiment, "measure", there.measure)
    monkeypatch.setattr(experiment, "references", lambda sets, clip: {"truth": {}, "chance": {}})
    monkeypatch.setattr(capstan.training.sample, "open_sampler", there.open_sampler)
    return there


@pytest.fixture
def recipe(squares: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe(key=value, …)`: an experiment on a dataset with a layer of two slots."""
    shutil.copytree(squares, tmp_path / "ds")
    storage, captions = Storage(str(tmp_path / "ds")), {}
    manifest, entries = Dataset(storage).manifest, []
    for number, entry in enumerate(manifest.shards):
        _move(storage, entry.table, 20 * number)
        entries.append(entry.model_copy(update={"table_sha256": sha256_of(storage.read(entry.table))}))
    write_manifest(storage, manifest.model_copy(update={"shards": entries}))
    dataset = Dataset(storage)
    for shard in dataset.shard_names:
        for key in dataset.table(shard, ["key"])["key"].to_pylist():
            captions[key] = {"short": "a red circle", "descriptive": f"one thing: a large red circle {key}."}
    write_given_layer(dataset.storage, "mine", captions)
    train = {"model": "diffusion", "run": str(tmp_path / "exp"), "steps": 40, "batch": 8}
    train |= {"diffusion": {"autoencoder": "./ae"}, "engine": {"launcher": "local"}}

    def make(**section: Any) -> Recipe:
        given = {"arms": list(RIGHT), "seeds": [0, 1, 2], "steps": [20, 40], "prompts": 30, "draws": 200, "parallel": 1}
        return Recipe(dataset=str(tmp_path / "ds"), source=SOURCE, train=train, experiment=given | section)

    return make


def test_arms_are_trained_and_measured_point_by_point(recipe: Callable[..., Recipe], stage: Stage) -> None:
    summary = experiment.run_blend(recipe())
    arms = [(f"{arm}-s{seed}", step) for seed in (0, 1, 2) for arm in RIGHT for step in (20, 40)]
    assert stage.trained == [("s0", 1), ("s1", 1), ("s2", 1), *arms]
    assert summary["runs"] == dict.fromkeys(RIGHT, 3)
    done = len(stage.trained)
    assert experiment.run_blend(recipe())["found"] == summary["found"]
    assert len(stage.trained) == done


def test_the_papers_order_is_told_where_it_is_there(recipe: Callable[..., Recipe], stage: Stage) -> None:
    summary = experiment.run_blend(recipe())
    told = [text for text in summary["found"] if text.startswith("The paper's order")]
    assert len(told) == 2
    order = "The paper's order, original < short95 < descriptive95, appears on"
    assert all(text.startswith(order) and "every difference excludes 0" in text for text in told)


def test_and_where_it_is_not(recipe: Callable[..., Recipe], stage: Stage) -> None:
    stage.right = {"original": 0.8, "short95": 0.3, "descriptive95": 0.3}
    told = " ".join(experiment.run_blend(recipe())["found"])
    assert "does not appear on original prompts" in told
    assert "does not appear on descriptive prompts" in told
    assert re.search(r"descriptive95 − original −0\.\d+ \[−0\.\d+, −0\.\d+\], which excludes 0", told)
    assert re.search(r"descriptive95 − short95 .* which includes 0", told)


def test_it_goes_on_where_it_stopped(recipe: Callable[..., Recipe], stage: Stage) -> None:
    stage.stop_at = ("short95-s1", 40)
    with pytest.raises(KeyboardInterrupt):
        experiment.run_blend(recipe())
    before = list(stage.trained)
    assert before[-1] == ("short95-s1", 20)
    report = (Path(recipe().train["run"]) / "report.html").read_text()
    assert "original 2, short95 1, descriptive95 1" in report  # what is known so far
    experiment.run_blend(recipe())
    assert stage.trained[len(before)] == ("short95-s1", 40)
    assert len(stage.trained) == len(set(stage.trained)) == 3 + 2 * 9


def test_arms_and_seeds_may_be_added_and_nothing_else_changed(recipe: Callable[..., Recipe], stage: Stage) -> None:
    experiment.run_blend(recipe(seeds=[0], arms=["original", "short95"]))
    done = len(stage.trained)
    experiment.run_blend(recipe(seeds=[0, 1]))
    assert set(stage.trained[done:]) == {
        ("s1", 1),
        *(
            (name, step)
            for name in ("descriptive95-s0", "original-s1", "short95-s1", "descriptive95-s1")
            for step in (20, 40)
        ),
    }
    with pytest.raises(RecipeError, match=r"train\.run: .* holds a different experiment \(changed: prompts\)"):
        experiment.run_blend(recipe(prompts=31))
    with pytest.raises(RecipeError, match=r"changed: arms\.original"):
        experiment.run_blend(recipe(arms={"original": {"blend": {"short": 1}}, "short95": None}))
    other = {"dataset": recipe().dataset, "source": {**SOURCE, "world": {**SOURCE["world"], "seed": 9}}}
    with pytest.raises(RecipeError, match=r"changed: source\)"):
        experiment.run_blend(recipe().model_copy(update={"source": Recipe(**other).source}))
    faster = recipe()
    assert faster.train is not None
    with pytest.raises(RecipeError, match=r"changed: train"):
        experiment.run_blend(faster.model_copy(update={"train": faster.train | {"lr": 1e-3}}))


def test_a_point_that_has_gone_by_unmeasured_is_not_made_up(recipe: Callable[..., Recipe], stage: Stage) -> None:
    experiment.run_blend(recipe(seeds=[0]))
    folder = Path(recipe().train["run"])
    (folder / "measured" / "original-s0" / "step-000020.json").unlink()
    (folder / "measured" / "original-s0" / "step-000040.json").unlink()
    with pytest.raises(CapstanError, match="original-s0 is past step 20 but was not measured there"):
        experiment.run_blend(recipe(seeds=[0]))


def test_without_the_world_a_clip_is_needed_before_anything_is_trained(
    recipe: Callable[..., Recipe], stage: Stage
) -> None:
    asked = recipe()
    assert asked.train is not None
    elsewhere = {"source": None, "train": asked.train | {"data": {"holdout": 30}}}
    with pytest.raises(RecipeError, match=r"experiment\.scorer: is null, but only images of the captioned world"):
        experiment.run_blend(asked.model_copy(update=elsewhere))
    assert stage.trained == []


def test_the_report_holds_all_that_was_asked_for(
    recipe: Callable[..., Recipe], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here images are really drawn, judged and shown."""
    for function in (measure, references):
        monkeypatch.setattr(experiment, function.__name__, function)
    experiment.run_blend(recipe(upsampler="captions", prompts=10, seeds=[0, 1]))
    folder = Path(recipe().train["run"])
    page = (folder / "report.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Findings",
        "By arm",
        "Differences",
        "By step",
        "Images of the same prompts",
        "Expanded prompts",
        "Captions used",
        "Cost",
        "Method",
    ]
    assert "descriptive 95.0%, original 5.0%" in page
    assert "CLIP score: not run" in page
    assert "Not run here: descriptive65, descriptive80, descriptive90, descriptive100, truth95" in page
    assert "word for word" in page
    asked = json.loads((folder / "prompts.json").read_text())
    assert asked["original"].keys() == {"distinct", "trained_on"}
    assert 0 <= asked["upsampled"]["kept"] <= 1
    assert asked["upsampled"]["trained_on"] == 1
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    results = json.loads((folder / "results.json").read_text())
    for part in ("original", "descriptive", "upsampled"):
        assert set(results["table"][part]["followed"]) == set(RIGHT)
    mean, low, high = results["table"]["descriptive"]["followed"]["descriptive95"]
    assert low < mean < high
    assert [step for step, _ in results["curves"]["descriptive"]["count"]["short95"]] == [20, 40]
    assert results["cost"]["original"] == {
        "runs": 2,
        "training_s": pytest.approx(2 * 40 * 8 / 100),
        "images": 2 * 40 * 8,
        "measuring_s": pytest.approx(results["cost"]["original"]["measuring_s"]),
        "pictures": 2 * (2 * 10 + 3 * 10),
    }
    assert results["references"]["truth"]["descriptive"]["followed"] > 0.95
    for name in ("curves.svg", "differences.svg"):
        assert (folder / "figures" / name).read_bytes().startswith(b'<svg xmlns="http://www.w3.org/2000/svg"')
    assert Image.open(folder / "figures" / "pictures.png").width > 500


def test_runs_go_side_by_side_and_one_that_fails_stops_the_others(
    recipe: Callable[..., Recipe], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment.run_blend(recipe(parallel=3, seeds=[0]))
    assert len(stage.trained) == 1 + 6

    def fail(recipe: Recipe) -> dict[str, Any]:
        if "short95-s1" in TrainConfig.from_recipe(recipe).run:
            raise CapstanError("training: the loss is not finite")
        return stage.train(recipe)

    monkeypatch.setattr(experiment, "train", fail)
    with pytest.raises(CapstanError, match="not finite"):
        experiment.run_blend(recipe(parallel=2, seeds=[0, 1, 2]))
