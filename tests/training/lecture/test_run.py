"""A lecture of small systems: trained for equal time, measured, stopped and resumed, and its page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from capstan.cluster.recipe import loaded
from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.captions import descriptive
from capstan.pipeline.world.scene import draw_scene, vocabulary
from capstan.pipeline.world.table import truth_of
from capstan.training.lecture import run as lecture_run
from capstan.training.lecture.results import MEASURES
from capstan.training.lecture.run import run_lecture

WORLD = WorldSource(scenes=40, size=32, textures=["plain"], shapes=["circle", "square"])
COMMON = {"steps": 9, "batch": 8, "lr": 1e-3, "data": {"layer": None}}
COMPOSER = {"width": 16, "cells": 4, "grid": 16, "heads": 2}
CODES = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 2, "codes": 16, "code_channels": 4}
TRAIN: dict[str, dict[str, Any]] = {
    "composer": {"model": "text2scene", "run": "out/c", "text2scene": COMPOSER},
    "codes": {"model": "vqgan", "run": "out/v", "vqgan": CODES},
}

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(make_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(names, key=value, …)`: a lecture of these systems in the folder `lecture`."""
    root = tmp_path_factory.mktemp("lecture")
    scenes = [draw_scene(WORLD.seed, index, vocabulary(WORLD)) for index in range(40)]
    dataset = make_dataset(
        root / "ds", [40], captions=lambda n: descriptive(scenes[n]), columns=lambda n: truth_of(scenes[n])
    )
    for name, section in TRAIN.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"dataset": "x", "train": section | COMMON}))

    def recipe(names: list[str], **section: Any) -> Recipe:
        listed = [{"name": name, "recipe": str(root / f"{name}.yaml"), "claim": f"{name} <wins>"} for name in names]
        base = {"run": str(root / "lecture"), "systems": listed, "minutes": 0.05, "clock": "cpu", "points": 2}
        base |= {"prompts": 6, "draws": 100}
        world = {"format": "world", "world": WORLD.model_dump(mode="json")}
        return loaded({"dataset": str(dataset), "source": world, "lecture": base | section})

    return recipe


def test_a_lecture_is_stopped_resumed_and_grows(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first, calls = make(["composer"]), []
    train_one = lecture_run.train_one

    def stopped(recipe: Recipe) -> Any:
        calls.append(recipe.train["steps"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_one(recipe)

    monkeypatch.setattr(lecture_run, "train_one", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_lecture(first, Path())
    summary = run_lecture(first, Path())
    folder = Path(summary["run"])
    assert summary["systems"] == 1
    before = (folder / "measured" / "composer-s0" / "step-000002.json").read_text()

    grown = run_lecture(make(["composer", "codes"]), Path())
    assert list(grown["seen"]) == ["composer", "codes"]
    assert (folder / "measured" / "composer-s0" / "step-000002.json").read_text() == before  # not measured again
    calls.clear()
    run_lecture(make(["composer", "codes"]), Path(), "codes")
    assert not calls  # nothing is left

    results = json.loads((folder / "results.json").read_text())
    composer, codes = results["systems"]
    assert (composer["kind"], codes["kind"]) == ("generator", "first stage")
    assert set(composer["values"]) == set(MEASURES)
    assert composer["ceiling"]["colour_shape"] > 0.8  # at 16 pixels the oracle misses some
    assert codes["values"]["psnr"][0] > 0
    assert {"perplexity"} <= set(codes["others"])
    for system in results["systems"]:
        assert system["parameters"] > 1000
        assert system["cpu_minutes"] >= 0.95 * 0.05  # the shortest piece may be longer
        points = [minutes for minutes, *_ in system["curves"]["count"]]
        assert len(points) == 2
        assert points == sorted(points)

    html = (folder / "index.html").read_text()
    assert html.count("<img") == 2 * 2 * 6  # the scene and a system, for all prompts, in two sheets
    assert "composer &lt;wins&gt;" in html
    assert not re.search(r"(?:src|href)=[\"']?https?:", html)
    with Image.open(folder / "strip.png") as strip:
        assert strip.width > strip.height / 2

    with pytest.raises(RecipeError, match=r"^lecture\.run: .* holds a lecture with other prompts"):
        run_lecture(make(["composer"], prompts=7), Path())
    with pytest.raises(RecipeError, match=r"^--only: no system dream"):
        run_lecture(make(["composer"]), Path(), "dream")


def test_a_run_may_be_measured_as_it_is(make: Make, tmp_path: Path) -> None:
    recipe = make(["composer"])
    summary = run_lecture(recipe, Path())
    run = str(Path(summary["run"]) / "systems" / "composer-s0")
    one = make([], systems=[{"name": "known", "run": run}], run=str(tmp_path / "other"))
    found = run_lecture(one, Path())
    assert list(found["seen"].values()) == [summary["seen"]["composer"]]
    results = json.loads((tmp_path / "other" / "results.json").read_text())
    assert results["systems"][0]["cpu_minutes"] > 0
