"""The sets of prompts, how short ones are expanded, and what true images score."""

from __future__ import annotations

from pathlib import Path

import pytest

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.captions import alt_kind, descriptive
from capstan.pipeline.world.scene import draw_scene, vocabulary
from capstan.recaption.store import write_given_layer
from capstan.training.config import TrainConfig
from capstan.training.experiment.config import ExperimentConfig
from capstan.training.experiment.measure import references
from capstan.training.experiment.prompts import prompt_sets, world_of
from capstan.training.experiment.upsample import Nearest, expanded

TRAIN = {"model": "diffusion", "run": "./x", "steps": 4, "diffusion": {"autoencoder": "./ae"}}


def sets_of(recipe: Recipe, layer: str | None = None) -> dict:
    return prompt_sets(recipe, ExperimentConfig.from_recipe(recipe), TrainConfig.from_recipe(recipe), layer)


@pytest.fixture(scope="module")
def world() -> Recipe:
    source = {"format": "world", "world": {"size": 32, "colours": ["red", "blue", "green"], "textures": ["plain"]}}
    return Recipe(dataset="ds", source=source, train=TRAIN, experiment={"prompts": 24})


def test_prompts_of_the_world_say_something_of_scenes_that_nobody_has_seen(world: Recipe) -> None:
    sets = sets_of(world)
    assert [len(prompts) for prompts in sets.values()] == [24, 24]
    assert all(prompt.wanted for prompts in sets.values() for prompt in prompts)
    assert all(len(prompt.text.split()) <= 14 for prompt in sets["original"])
    assert all(len(prompt.text.split()) >= 14 for prompt in sets["descriptive"])
    assert [prompt.text for prompt in sets["original"]] == [prompt.text for prompt in sets_of(world)["original"]]
    source = world_of(world)
    assert source is not None
    trained = {descriptive(draw_scene(source.seed, index, vocabulary(source))) for index in range(500)}
    assert sum(prompt.text in trained for prompt in sets["descriptive"]) <= 2  # scenes of one thing have few words
    kinds = {alt_kind(draw_scene(source.seed + 8_641_000_001, p.seed, vocabulary(source))) for p in sets["original"]}
    assert kinds <= {"fragment", "partial", "honest"}


def test_true_images_score_far_above_those_of_other_prompts(world: Recipe) -> None:
    found = references(sets_of(world), None)
    for name in ("original", "descriptive"):
        true, other = (found[kind][name]["followed"] for kind in ("truth", "chance"))
        assert sum(true) / len(true) > 0.97
        assert sum(other) / len(other) < 0.65
    assert None in found["truth"]["original"]["relation"]


def test_other_datasets_give_the_captions_that_are_held_out(squares: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(squares, tmp_path / "ds")
    dataset, captions = Dataset(Storage(str(tmp_path / "ds"))), {}
    for shard in dataset.shard_names:
        for key in dataset.table(shard, ["key"])["key"].to_pylist():
            captions[key] = {"descriptive": f"a description of {key}"}
    write_given_layer(dataset.storage, "mine", captions)
    recipe = Recipe(dataset=str(tmp_path / "ds"), train=TRAIN | {"data": {"holdout": 10}}, experiment={"prompts": 6})
    sets = sets_of(recipe, "mine")
    assert [prompt.text for prompt in sets["original"]] == [
        f"a {['red', 'green', 'blue', 'yellow'][index % 4]} square, number {index}" for index in range(54, 60)
    ]
    assert all(prompt.text.startswith("a description of") for prompt in sets["descriptive"])
    few = recipe.model_copy(update={"train": TRAIN | {"data": {"holdout": 3}}})
    with pytest.raises(RecipeError, match=r"train\.data\.holdout: is 3, but 6 prompts"):
        sets_of(few, "mine")
    with pytest.raises(RecipeError, match=r"train\.data\.layer: is null"):
        sets_of(recipe, None)
    config = ExperimentConfig(prompts=6, upsampler="captions")
    found = expanded(recipe, config, "mine", ["a description"], holdout=10)
    assert found is not None
    assert found[0] not in {prompt.text for prompt in sets["descriptive"]}  # nothing that was held out


def test_the_nearest_caption_shares_what_is_rare() -> None:
    nearest = Nearest(
        [
            "on a white background there are two things: a large red circle and a small blue square.",
            "on a white background there are two things: a large blue circle and a small red square.",
            "an image with a grey background and one thing: a small green star.",
        ]
    )
    assert "red circle" in nearest("red circle clip art")
    assert "blue circle" in nearest("a red square and a blue circle")
    assert "star" in nearest("drawing of star")
    assert nearest("something else") == nearest("something else")
    assert expanded(Recipe(dataset="ds"), ExperimentConfig(), None, ["a"]) is None
    with pytest.raises(RecipeError, match="needs descriptive captions"):
        expanded(Recipe(dataset="ds"), ExperimentConfig(upsampler="captions"), None, ["a"])
