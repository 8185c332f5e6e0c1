"""Arms are one recipe's runs: they differ by their captions, and by nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption.store import write_given_layer
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.experiment.arms import Trial, arm_recipe, layers, start_recipe, trials
from capstan.training.experiment.config import STANDARD, ExperimentConfig
from capstan.training.run import differences

ARMS = list(STANDARD)


@pytest.fixture
def captioned(squares: Path, tmp_path: Path) -> Path:
    """The squares with two layers: a captioner's, and what is true."""
    shutil.copytree(squares, tmp_path / "ds")
    dataset = Dataset(Storage(str(tmp_path / "ds")))
    for layer in ("truth", "written"):
        captions = {}
        for shard in dataset.shard_names:
            for key in dataset.table(shard, ["key"])["key"].to_pylist():
                captions[key] = {slot: f"{layer} {slot} {key}" for slot in ("short", "descriptive")}
        write_given_layer(dataset.storage, layer, captions)
    return tmp_path / "ds"


def recipe_of(dataset: Path, **train: object) -> Recipe:
    section = {"model": "diffusion", "run": "./exp", "steps": 40, "data": {"layer": "written"}, **train}
    return Recipe(
        dataset=str(dataset),
        train={**section, "diffusion": {"autoencoder": "./ae"}},
        experiment={"arms": ARMS, "seeds": [0, 7]},
    )


def test_arms_of_a_seed_differ_by_layer_and_blend_alone(captioned: Path) -> None:
    recipe = recipe_of(captioned)
    config, train = ExperimentConfig.from_recipe(recipe), TrainConfig.from_recipe(recipe)
    found = layers(recipe, config, train, "written")
    identities = {
        trial: TrainConfig.from_recipe(
            arm_recipe(recipe, config.arms[trial.arm], found[trial.arm], Path("exp"), trial)
        ).identity()
        for trial in trials(config)
    }
    assert len(identities) == 2 * len(ARMS)
    for arm in ARMS[1:]:
        changed = set(differences(identities[Trial("original", 0)], identities[Trial(arm, 0)]))
        allowed = {f"data.blend.{slot}" for slot in ("original", "short", "descriptive")}
        assert changed <= allowed | ({"data.layer"} if arm.startswith("truth") else set())
        assert changed & allowed
    assert set(differences(identities[Trial("original", 0)], identities[Trial("original", 7)])) == {"seed", "init"}


def test_arms_see_the_same_images_in_the_same_order(captioned: Path) -> None:
    recipe = recipe_of(captioned)
    config, train = ExperimentConfig.from_recipe(recipe), TrainConfig.from_recipe(recipe)
    found = layers(recipe, config, train, "written")
    seen = {}
    for name, arm in config.arms.items():
        own = TrainConfig.from_recipe(arm_recipe(recipe, arm, found[name], Path("exp"), Trial(name, 7)))
        data = TrainingData(Dataset(Storage(recipe.dataset)), own.data, own.seed, layer=own.data.layer)
        seen[name] = [data.at(number) for number in range(300)]
    keys = {name: [sample.key for sample in samples] for name, samples in seen.items()}
    assert all(order == keys["original"] for order in keys.values())
    assert {sample.slot for sample in seen["original"]} == {"original"}
    assert {sample.slot for sample in seen["descriptive100"]} == {"descriptive"}
    for name, share in (("short95", 0.95), ("descriptive65", 0.65), ("truth95", 0.95)):
        drawn = sum(sample.slot != "original" for sample in seen[name]) / 300
        assert drawn == pytest.approx(share, abs=0.08)
    originals = {name: {n for n, s in enumerate(seen[name]) if s.slot == "original"} for name in seen}
    assert originals["descriptive95"] < originals["descriptive80"] < originals["descriptive65"]  # blends are nested
    assert all(sample.text.startswith("truth") for sample in seen["truth95"] if sample.slot != "original")
    assert originals["truth95"] == originals["descriptive95"]


def test_all_arms_begin_with_one_vocabulary_of_all_captions(captioned: Path) -> None:
    recipe = recipe_of(captioned)
    config = ExperimentConfig.from_recipe(recipe)
    start = TrainConfig.from_recipe(start_recipe(recipe, ["original", "short"], "written", Path("exp"), 7))
    assert start.steps == 1
    assert start.lr < 1e-9
    assert start.data.weights == {"original": 0.5, "short": 0.5}
    arm = arm_recipe(recipe, config.arms["short95"], "written", Path("exp"), Trial("short95", 7))
    assert TrainConfig.from_recipe(arm).init == start.run
    given = arm_recipe(recipe_of(captioned, init="./mine"), config.arms["short95"], "written", Path("e"), Trial("a", 0))
    assert TrainConfig.from_recipe(given).init == "./mine"


def test_an_arm_without_its_captions_is_refused(captioned: Path) -> None:
    shutil.rmtree(captioned / "captions" / "truth")
    recipe = recipe_of(captioned)
    config, train = ExperimentConfig.from_recipe(recipe), TrainConfig.from_recipe(recipe)
    with pytest.raises(RecipeError, match=r"experiment\.arms\.truth95\.layer: .* no caption layer 'truth'"):
        layers(recipe, config, train, "written")
    recipe = recipe.model_copy(update={"experiment": {"arms": {"original": None, "x": {"blend": {"shrt": 1}}}}})
    with pytest.raises(RecipeError, match=r"experiment\.arms\.x\.blend: .* no slot 'shrt'"):
        layers(recipe, ExperimentConfig.from_recipe(recipe), train, "written")
    none = recipe_of(captioned, data={"layer": None})
    with pytest.raises(RecipeError, match=r"is null, but the arm short95 uses its captions"):
        layers(none, config, TrainConfig.from_recipe(none), None)
