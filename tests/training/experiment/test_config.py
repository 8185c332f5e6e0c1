"""The section `experiment`: what it means, and what is said where it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from capstan.cluster.cli import run as capstan
from capstan.cluster.recipe import load, schema
from capstan.training.config import TrainConfig
from capstan.training.experiment.config import STANDARD, ExperimentConfig
from capstan.training.experiment.run import runs_at_once

TRAIN = {"model": "diffusion", "run": "./x", "steps": 400, "diffusion": {"autoencoder": "./ae"}}


def write(folder: Path, experiment: Any, **train: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dataset": "./ds", "train": TRAIN | train, "experiment": experiment}))
    return path


def test_arms_by_name_and_of_ones_own(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, {"arms": ["original", "descriptive65"]}))
    assert ExperimentConfig.from_recipe(recipe).arms["descriptive65"].shares == {"descriptive": 0.65, "original": 0.35}
    own = {"arms": {"short95": None, "half": {"blend": {"short": 1, "original": 1}, "layer": "mine"}}}
    config = ExperimentConfig.from_recipe(load(write(tmp_path, own)))
    assert config.arms["short95"] == STANDARD["short95"]
    assert config.arms["half"].shares == {"short": 0.5, "original": 0.5}
    every = ExperimentConfig.from_recipe(load(write(tmp_path, {})))
    assert list(every.arms) == [
        "original",
        "short95",
        *(f"descriptive{percent}" for percent in (65, 80, 90, 95, 100)),
    ]
    assert len(every.seeds) == 3
    assert ExperimentConfig.from_recipe(load(write(tmp_path, {"arms": None}))) == every


@pytest.mark.parametrize(
    ("experiment", "train", "said"),
    [
        ({"arm": []}, {}, "experiment.arm: unknown key. Fix: did you mean arms?"),
        ({"arms": ["original"]}, {}, "experiment.arms: "),
        ({"arms": ["original", "orignal"]}, {}, "has no standard arm 'orignal'; use one of original, short95"),
        ({"arms": ["original", "original"]}, {}, "names original twice"),
        ({"arms": {"original": None, "mine": {"blend": {"short": 0}}}}, {}, "all weights are 0"),
        ({"arms": {"original": None, "Mine!": {"blend": {"short": 1}}}}, {}, "experiment.arms.Mine!"),
        ({"arms": [["original"], "short95"]}, {}, "['original'] is not the name of a standard arm"),
        ({}, {"run": "s3://bucket/x"}, "train.run: is a bucket, but an experiment needs a folder"),
        ({"seeds": [1, 1]}, {}, "seeds has a seed twice"),
        ({"seeds": []}, {}, "experiment.seeds"),
        ({"steps": [400, 200]}, {}, "steps must increase"),
        ({"steps": [100, 200]}, {}, "experiment.steps: ends at 200, but train.steps is 400"),
        ({"steps": [200, 400]}, {"schedule": "cosine"}, "train.schedule: cosine depends on the last step"),
        ({"prompts": 1}, {}, "experiment.prompts"),
        ({"scorer": {"pretrained": "x"}}, {}, "experiment.scorer.model: is missing"),
        ({"upsampler": "gpt"}, {}, "experiment.upsampler: must be captions, null, or a section"),
        ({"upsampler": {"engine": "coca"}}, {}, "experiment.upsampler.engine: coca cannot expand text"),
        ({"upsampler": {"engine": "openai"}}, {}, "experiment.upsampler: server.url is missing"),
        ({}, {"model": "autoencoder", "diffusion": {"autoencoder": "x"}}, "cannot generate images from prompts"),
        ([], {}, "experiment"),
    ],
)
def test_mistakes_are_named(
    experiment: Any, train: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert capstan(["experiment", "blend", str(write(tmp_path, experiment, **train))]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Fix: " in error


def test_a_recipe_without_the_section_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert capstan(["experiment", "blend", str(write(tmp_path, None))]) == 2
    assert "experiment: is missing" in capsys.readouterr().err


def test_it_is_in_the_schema() -> None:
    whole = schema()
    assert {"arms", "seeds", "steps", "scorer", "upsampler", "parallel"} <= whole["$defs"]["ExperimentConfig"][
        "properties"
    ].keys()
    assert whole["properties"]["experiment"]


@pytest.mark.parametrize(
    ("engine", "asked", "cores", "gpus", "expected"),
    [
        ({"workers": 1, "threads": 1, "launcher": "local"}, None, 2, 0, 2),
        ({"workers": 2, "threads": 1, "launcher": "local"}, None, 8, 0, 4),
        ({"workers": 1, "launcher": "local"}, None, 8, 0, 1),
        ({"workers": 1, "launcher": "local"}, 3, 8, 0, 3),
        ({"workers": 2}, None, 16, 8, 4),
        ({"workers": 8}, None, 16, 4, 1),
        ({"workers": 1, "launcher": "local"}, None, 16, 4, 1),
    ],
)
def test_as_many_runs_at_once_as_there_is_room_for(
    engine: dict[str, Any], asked: int | None, cores: int, gpus: int, expected: int
) -> None:
    train = TrainConfig.from_section(TRAIN | {"engine": engine})
    assert runs_at_once(ExperimentConfig(parallel=asked), train, cores, gpus) == expected
