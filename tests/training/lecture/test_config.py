"""The section `lecture`, and the runs that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from repo import ROOT

from capstan.cluster.recipe import load, loaded
from capstan.pipeline.errors import RecipeError
from capstan.training.lecture.config import LectureConfig
from capstan.training.lecture.systems import plan

WORLD = {"format": "world", "world": {"size": 32}}
AUTOENCODER = {"model": "autoencoder", "run": "out/ae", "steps": 9, "data": {"layer": None}}
TEXT = {"vocab_size": 600, "length": 16, "width": 32, "layers": 1, "heads": 2}
DIFFUSION = {
    "before": [AUTOENCODER],
    "model": "diffusion",
    "run": "out/ldm",
    "steps": 9,
    "schedule": "cosine",
    "data": {"layer": None},
    "diffusion": {"autoencoder": "out/ae", "text": TEXT},
}


def lecture(**section: Any) -> dict[str, Any]:
    return {"run": "out/lecture", "systems": [{"name": "a", "recipe": "a.yaml"}], **section}


def config(**section: Any) -> LectureConfig:
    return LectureConfig.from_recipe(loaded({"dataset": "ds", "source": WORLD, "lecture": lecture(**section)}))


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"systems": []}, r"lecture\.systems"),
        ({"systems": [{"name": "a"}]}, "a needs either recipe: FILE or run: FOLDER"),
        ({"systems": [{"name": "a", "recipe": "x", "run": "y"}]}, "a needs either"),
        ({"systems": [{"name": "a", "recipe": "x"}, {"name": "a", "run": "y"}]}, "systems has a twice"),
        ({"seeds": [1, 1]}, "seeds has a seed twice"),
        ({"minutes": 0}, r"lecture\.minutes"),
        ({"clock": "sun"}, r"lecture\.clock"),
    ],
)
def test_a_wrong_section_is_named(section: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        config(**section)


def test_only_the_captioned_world_has_the_oracle() -> None:
    recipe = {"dataset": "ds", "source": {"format": "folder", "path": "x"}, "lecture": lecture()}
    with pytest.raises(RecipeError, match=r"^source\.format: a lecture is measured by the captioned world's oracle"):
        loaded(recipe)


def write(folder: Path, train: dict[str, Any]) -> None:
    (folder / "a.yaml").write_text(yaml.safe_dump({"dataset": "elsewhere", "train": train}))


def test_runs_before_a_system_share_its_minutes_and_lie_in_the_lectures_folder(tmp_path: Path) -> None:
    write(tmp_path, DIFFUSION)
    system = {"name": "a", "recipe": "a.yaml", "first": 0.25, "set": {"train.diffusion.sampling.steps": 3}}
    whole = config(systems=[system], minutes=8, seeds=[3])
    made = plan(whole.systems[0], 3, whole, tmp_path)
    assert [stage.minutes for stage in made.stages] == [2, 6]
    first, last = (stage.section for stage in made.stages)
    assert first["run"] == "out/lecture/systems/a-s3-first-0"
    assert last["run"] == "out/lecture/systems/a-s3"
    assert last["diffusion"]["autoencoder"] == first["run"]
    assert last["diffusion"]["sampling"] == {"steps": 3}
    assert (last["seed"], last["schedule"], last["engine"]["threads"]) == (3, "constant", 1)
    recipe = made.stages[0].recipe(loaded({"dataset": "ds", "source": WORLD, "lecture": lecture()}), 40)
    assert (recipe.dataset, recipe.train["steps"], recipe.lecture) == ("ds", 40, None)


@pytest.mark.parametrize(
    ("train", "changes", "field"),
    [
        (None, {}, r"lecture\.systems\.a\.recipe: cannot read"),
        ({}, {}, r"lecture\.systems\.a\.recipe: .*has no section train"),
        (DIFFUSION, {"batch": 3}, r"lecture\.systems\.a\.set: batch is not a key of train"),
        (DIFFUSION, {"train.lr": -1}, r"train\.lr"),
        ({"model": "ddpm", "run": "x", "steps": 1, "data": {"layer": None}}, {}, "ddpm takes no prompts"),
    ],
)
def test_a_wrong_system_is_named(tmp_path: Path, train: Any, changes: dict[str, Any], field: str) -> None:
    if train is not None:
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({"dataset": "x"} | ({"train": train} if train else {})))
    whole = config(systems=[{"name": "a", "recipe": "a.yaml", "set": changes}])
    with pytest.raises(RecipeError, match=field):
        plan(whole.systems[0], 0, whole, tmp_path)


def test_every_system_of_the_example_is_a_plan() -> None:
    recipe = load(ROOT / "examples" / "lecture.yaml")
    whole = LectureConfig.from_recipe(recipe)
    made = {system.name: plan(system, 0, whole, ROOT / "examples") for system in whole.systems}
    assert {"text2scene", "ddpm", "latent-diffusion", "autoencoder", "vqgan"} <= set(made)
    for name, one in made.items():
        minutes = [stage.minutes for stage in one.stages]
        assert not minutes or sum(minutes) == pytest.approx(whole.minutes), name
        assert all(str(stage.folder).startswith(whole.run) for stage in one.stages), name
