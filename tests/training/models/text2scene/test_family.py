"""Text2Scene: runs that resume, scenes with and without a user's parts, and an export that needs no Capstan."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import records, wait_for_step

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.captions import descriptive
from capstan.pipeline.world.scene import BACKGROUNDS, Scene, draw_scene, vocabulary
from capstan.pipeline.world.table import truth_of
from capstan.training.config import TrainConfig
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.launch import train
from capstan.training.models.text2scene.family import Text2sceneFamily, coverage
from capstan.training.models.text2scene.modeling_text2scene import Text2SceneConfig, fitting
from capstan.training.models.text2scene.vocabulary import as_numbers, content_words, things_of
from capstan.training.run import Run
from capstan.training.run_data import open_data
from capstan.training.sample import open_sampler, sample
from capstan.training.trainer import fit

WORLD = WorldSource(scenes=40, size=32, textures=["plain"], shapes=["circle", "square"])
SMALL = {"width": 16, "cells": 4, "grid": 16, "sizes": 12, "heads": 2}
PROMPT = "a red circle on the left of a blue square. there is nothing else."

Make = Callable[..., Recipe]


def scene(index: int) -> Scene:
    return draw_scene(WORLD.seed, index, vocabulary(WORLD))


@pytest.fixture(scope="module")
def make(make_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(run, text2scene, key=value, …)`: a recipe of four steps in a folder `run`."""
    root = tmp_path_factory.mktemp("text2scene")
    dataset = make_dataset(
        root / "ds", [25, 15], captions=lambda n: descriptive(scene(n)), columns=lambda n: truth_of(scene(n))
    )

    def recipe(run: str, settings: dict[str, Any] | None = None, **section: Any) -> Recipe:
        base = {"model": "text2scene", "run": str(root / run), "steps": 4, "batch": 8, "lr": 3e-3, "log_every": 1}
        base |= {"warmup": 2, "ema": 0.5, "data": {"layer": None}, "watch": {"trackers": []}}
        base |= {"engine": {"strategy": "ddp", "threads": 1, "launcher": "local"}}
        source = {"format": "world", "world": WORLD.model_dump(mode="json")}
        return Recipe(
            dataset=str(dataset), source=source, train=base | {"text2scene": SMALL | (settings or {})} | section
        )

    return recipe


@pytest.fixture(scope="module")
def run(make: Make) -> Path:
    """A run that has learnt what scenes look like: a background, then things of known shapes and colours."""
    watch = {"trackers": [], "samples": {"every": 60, "count": 3}}
    return Path(fit(make("run", steps=120, warmup=10, ema=0.9, lr=1e-2, watch=watch))["run"])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "product" / "model.safetensors")


# Training ------------------------------------------------------------------------------------------------------------


def test_every_part_of_the_loss_falls(run: Path) -> None:
    log = records(run)
    for name in ("loss", "objects", "places", "attributes", "sizes", "coverage_objects", "coverage_attributes"):
        first, last = (np.mean([record[name] for record in part]) for part in (log[:10], log[-10:]))
        assert last < first, name
    assert (run / "samples" / "step-000060.png").is_file()


def test_a_killed_run_ends_as_one_that_was_not(make: Make, tmp_path: Path) -> None:
    recipe = make("killed", steps=200, checkpoint={"every": 1, "keep": 1})
    (path := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = warm_python.Popen([sys.executable, "-m", "capstan.training.trainer", str(path)], env=environment)
    killed = Path(TrainConfig.from_recipe(recipe).run)
    wait_for_step(killed, 2)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    before = records(killed)[-1]["step"]
    assert before < 200
    for name in ("killed", "whole"):
        fit(make(name, steps=before + 3, checkpoint={"every": 1, "keep": 1}))
    whole = killed.with_name("whole")
    assert records(killed) == records(whole)
    ours, theirs = weights(killed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_workers_and_two_parts_learn_what_one_learns(make: Make) -> None:
    one = Path(fit(make("one", ema=None))["run"])
    two = make(
        "two", ema=None, accumulate=2, engine={"strategy": "ddp", "threads": 1, "launcher": "local", "workers": 2}
    )
    other = Path(train(two)["run"])
    for a, b in zip(records(one), records(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["coverage_objects"] == pytest.approx(b["coverage_objects"], rel=1e-5)
    ours, theirs = weights(one), weights(other)
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"grid": 15}, "train.text2scene: grid 15 is not a multiple of cells 4"),
        ({"heads": 3}, r"train.text2scene: width 16 does not divide by 2 × heads \(6\)"),
        ({"order": "random"}, "train.text2scene.order"),
        ({"parts": "/no/parts"}, "train.text2scene.parts: /no/parts is not a folder"),
        ({"palette": {"red": [300, 0, 0]}}, r"train\.text2scene\.palette"),
    ],
)
def test_a_wrong_setting_ends_with_its_field(make: Make, tmp_path: Path, settings: dict[str, Any], field: str) -> None:
    recipe = make("wrong", settings).model_dump(mode="json")
    (path := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "capstan", "train", str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = warm_python.run(command, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 2, out.stderr
    with pytest.raises(RecipeError, match=field) as found:
        TrainConfig.from_recipe(make("wrong", settings))
    assert str(found.value).split(":")[0] in out.stderr


def test_a_dataset_without_objects_is_named(make: Make, squares: Path) -> None:
    recipe = make("none").model_copy(update={"dataset": str(squares)})
    with pytest.raises(RecipeError, match=r"train\.text2scene: no sample of the dataset has objects"):
        fit(recipe)


def test_a_product_starts_another_run(make: Make, run: Path) -> None:
    same = Path(fit(make("next", init=str(run), lr=1e-12, steps=1, ema=None))["run"])
    before, after = weights(run), weights(same)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match=r"^train\.init: .* has a different shape"):
        fit(make("wider", {"width": 32}, init=str(run), steps=1))


def test_labels_and_boxes_alone_train_it(make: Make, make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    boxes = [{"label": "cat", "box": [0.1, 0.1, 0.4, 0.5]}, {"label": "sofa", "box": [0, 0.3, 1, 1]}]
    dataset = make_dataset(
        tmp_path / "ds", [12], captions=lambda n: "a cat on a sofa", columns=lambda n: {"objects": json.dumps(boxes)}
    )
    recipe = make("boxes", {"order": "area"}, steps=40, lr=1e-2, ema=None)
    recipe = recipe.model_copy(update={"dataset": str(dataset), "source": None})
    run = Path(fit(recipe)["run"])
    summary = sample(run, ["a cat on a sofa"], tmp_path / "cat.png")
    row = json.loads(Path(summary["scenes"]).read_text())[0]
    assert row["background"] is None
    assert [thing["label"] for thing in row["objects"]] == ["sofa", "cat"]  # the largest first


# Drawing -------------------------------------------------------------------------------------------------------------


def test_a_scene_is_written_as_json_svg_and_drawing(run: Path, tmp_path: Path) -> None:
    summary = sample(run, [PROMPT, "a green square on a white background."], tmp_path / "grid.png")
    assert summary["size"] == [16, 16]
    rows = json.loads((tmp_path / "grid.json").read_text())
    assert [row["prompt"] for row in rows] == [PROMPT, "a green square on a white background."]
    for row in rows:
        assert row["background"] in BACKGROUNDS
        assert {thing["label"] for thing in row["objects"]} <= {"circle", "square"}
        svg = (tmp_path / row["svg"]).read_text()
        assert svg.count("<polygon") == len(row["objects"])
        assert svg.count("<title>") == len(row["objects"])
    drawer = open_sampler(run)
    one, two = (drawer.draw([PROMPT] * n, [0, 1][:n]) for n in (1, 2))
    assert one.arrays[0] == two.arrays[0] == two.arrays[1]  # the likeliest scene, whatever the seed and the batch
    with pytest.raises(RecipeError, match=r"^--guidance: this model has no such setting"):
        drawer.draw([PROMPT], [0], guidance=2.0)


def test_warm_choices_depend_on_the_seed_alone(run: Path) -> None:
    drawer = open_sampler(run)
    drawer.temperature = 1.0
    first, second = drawer.draw([PROMPT] * 6, range(6)).arrays, drawer.draw([PROMPT] * 2, [3, 4]).arrays
    assert list(first[3:5]) == list(second)
    assert len({json.dumps(one) for one in first}) > 1


def test_scenes_are_judged_by_layout_and_by_their_drawings(run: Path) -> None:
    result = evaluate(run, count=12, measures=["oracle", "layout"])["measures"]
    assert {"background", "colour_shape", "layout_place", "layout_relation", "layout_overlap"} <= set(result)
    assert result["layout_attributes"]["ceiling"] == result["layout_overlap"]["ceiling"] == 1.0
    assert result["background"]["value"] > result["background"]["chance"]


def test_an_image_is_not_judged_by_layout(make: Make) -> None:
    section = make("x").train | {"model": "ddpm", "ddpm": {"text": {"vocab_size": 600, "length": 16}}}
    section["watch"] = {"evaluate": {"every": 1, "count": 2, "measures": ["layout"]}}
    with pytest.raises(
        RecipeError, match=r"train\.watch\.evaluate\.measures: layout judges scenes, and this model draws"
    ):
        fit(make("y").model_copy(update={"train": section}))


# Parts ---------------------------------------------------------------------------------------------------------------


def test_a_users_parts_are_the_vocabulary_and_the_drawing(make: Make, tmp_path: Path) -> None:
    parts = tmp_path / "clip art"
    parts.mkdir()
    Image.new("RGBA", (8, 8), (255, 0, 255, 255)).save(parts / "circle.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(parts / "red circle.png")
    run = Path(fit(make("parts", {"parts": str(parts), "background": None}, steps=40, lr=1e-2, ema=None))["run"])
    drawer = open_sampler(run)
    assert drawer.model.config.labels == ["circle"]  # no square has a part
    made = {"background": "white", "objects": [{"label": "circle", "colour": "blue", "box": [0.25, 0.25, 0.75, 0.75]}]}
    picture = np.asarray(drawer.model.picture(made, 16))
    assert picture[8, 8].tolist() == [255, 0, 255]
    assert picture[1, 1].tolist() == [250, 250, 250]
    made["objects"][0]["colour"] = "red"
    assert np.asarray(drawer.model.picture(made, 16))[8, 8].tolist() == [255, 0, 0]
    assert "data:image/png;base64," in drawer.model.svg(made)

    for file in parts.iterdir():
        file.rename(file.with_name(file.name.replace("circle", "dog")))
    with pytest.raises(RecipeError, match=r"train\.text2scene\.parts: .* has no image of any label"):
        fit(make("dogs", {"parts": str(parts)}))


def test_the_name_that_agrees_most_is_chosen() -> None:
    files = [Path(name) for name in ("circle.png", "large circle.png", "large red circle.png", "square.png")]
    values = {"colour": ["", "red", "blue"], "size": ["", "large", "small"]}
    for thing, name in (
        ({"colour": "red", "size": "large"}, "large red circle.png"),
        ({"colour": "blue", "size": "large"}, "large circle.png"),
        ({"colour": "blue", "size": "small"}, "circle.png"),
    ):
        assert str(fitting(files, {"label": "circle"} | thing, values)) == name
    assert fitting(files, {"label": "star"}, values) is None


# Elsewhere -----------------------------------------------------------------------------------------------------------

_ELSEWHERE = """
import sys
import numpy as np
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
np.save(sys.argv[1] + ".npy", np.asarray(model.picture(model.compose([sys.argv[2]])[0])))
ours = [name for name in sys.modules if name.split(".")[0] == "capstan"]
assert not ours, ours
"""


def test_transformers_alone_draws_what_we_draw(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert export(run, folder)["pipeline"] == "Text2SceneModel"
    assert not list((run / "product").glob("*.py"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", _ELSEWHERE, str(folder), PROMPT]
    warm_python.run(command, check=True, cwd=tmp_path, timeout=500, env=environment)
    ours = [open_sampler(place).draw([PROMPT], [0]).drawings[0] for place in (run, folder)]
    assert (ours[0] == ours[1]).all()
    assert (np.load(f"{folder}.npy") == ours[0]).all()


# Numbers -------------------------------------------------------------------------------------------------------------


def test_the_column_may_be_json_or_its_text_and_hold_what_is_no_thing() -> None:
    good = {"label": "cat", "box": [0, 0, 0.5, 0.5], "color": "black"}
    listed = [good, {"label": "dog"}, {"label": "", "box": [0, 0, 1, 1]}, "cat", {"label": "cow", "box": [1, 2]}]
    assert things_of(json.dumps({"objects": listed}), None) == [good]
    assert things_of(json.dumps({"objects": json.dumps(listed)}), None) == [good]
    assert things_of("{}", "background") == []
    behind = things_of(json.dumps({"objects": listed, "background": "white"}), "background")[0]
    assert behind == {"label": "background", "box": [0, 0, 1, 1], "color": "white"}


def test_boxes_survive_their_grid(make: Make, run: Path) -> None:
    recipe = make("run")
    train_config = TrainConfig.from_recipe(recipe)
    family = Text2sceneFamily(train_config, run / "assets")
    data = open_data(recipe, train_config, Run(train_config))
    samples = [data.sample(index) for index in range(8)]
    batch = family.prepare(samples)
    for row, one in enumerate(samples):
        for step, thing in enumerate(things_of(one.extra, "background")):
            centre = [sum(thing["box"][axis::2]) / 2 for axis in (0, 1)]
            found = batch["boxes"][row, step]
            assert ((found[:2] + found[2:]) / 2 - torch.tensor(centre)).abs().max() <= 1 / 32 + 1e-6
            assert (found[2] - found[0]) == pytest.approx(thing["box"][2] - thing["box"][0], abs=1 / 24 + 1e-6)
        assert batch["labels"][row, step + 1] == 0


def test_as_printed_the_coverage_cannot_fall_when_words_outnumber_things() -> None:
    things, counted = torch.tensor([[True, True, False]]), torch.ones(1, 48, dtype=torch.bool)
    even = [torch.full((1, 48), 1 / 48)] * 3  # the best that two things can do for 48 words
    printed = coverage(even, things, counted, reachable=False)
    assert printed == pytest.approx(48 * (1 - 2 / 48) ** 2)
    assert coverage(even, things, counted) == pytest.approx(0, abs=1e-6)
    one = torch.zeros(1, 48).index_fill(1, torch.tensor([5]), 1.0)
    assert coverage([one] * 3, things, counted) > 1


def test_content_words_name_labels_or_values() -> None:
    config = Text2SceneConfig(
        words=["a", "circles", "red", "on"], labels=["circle"], attributes={"colour": ["", "red"]}
    )
    of_labels, of_values = content_words(config)
    assert of_labels.tolist() == [False, False, False, True, False, False]
    assert of_values.tolist() == [False, False, False, False, True, False]
    numbers = as_numbers(config, [{"label": "star", "box": [0, 0, 1, 1]}])
    assert numbers["labels"][:2].tolist() == [0, -1]  # an unknown label is left out
