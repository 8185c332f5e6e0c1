"""The section train: what is accepted, what is refused with which words, and what a run may change."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from repo import HELPERS

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig, json_schema
from capstan.training.config.families import FAMILIES, family_class, traits_of

TINY = "tiny_family:TinyFamily"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HELPERS))


def config(**section: Any) -> TrainConfig:
    raw = {"model": TINY, "run": "run", "steps": 10, "batch": 8, **section}
    return TrainConfig.from_recipe(Recipe(dataset="ds", train=raw))


def test_defaults_and_the_familys_own_settings() -> None:
    assert config().settings.width == 16
    assert config(tiny={"width": 4}).settings.width == 4
    assert config().engine.zero == 2
    assert config().data.weights == {"descriptive": 0.95, "original": 0.05}
    assert config(data={"layer": None}).data.weights == {"original": 1.0}
    assert config(data={"blend": {"short": 3, "original": 1, "x": 0}}).data.weights == {"original": 0.25, "short": 0.75}


@pytest.mark.parametrize(
    ("section", "field", "words"),
    [
        ({"stepz": 3}, "train.stepz", "did you mean steps"),
        ({"batch": 7, "engine": {"workers": 2}}, "train", "batch: 8"),
        ({"model": "difusion"}, "train.model", "diffusion"),
        ({"model": "no.such:Family"}, "train.model", "cannot load"),
        ({"tiny": {"widht": 3}}, "train.tiny.widht", "did you mean width"),
        ({"run": "s3://b/run", "checkpoint": {"upload": "s3://b/other"}}, "train", "remove checkpoint.upload"),
        ({"engine": {"strategy": "ddp", "offload": True}}, "train.engine", "zero: 1, 2 or 3"),
        ({"engine": {"workers": 0}}, "train.engine.workers", r"2 or \[1, 8\]"),
        ({"engine": {"workers": [2]}}, "train.engine.workers", r"2 or \[1, 8\]"),
        ({"engine": {"workers": [3, 2]}}, "train.engine", r"set \[2, 3\]"),
        ({"schedule": "cos"}, "train.schedule", "must be one of constant, cosine, linear"),
        ({"schedule": {"restart": 0}}, "train.schedule.restart", "greater than or equal to 1"),
        ({"schedule": {"restart": 5, "than": "cosine"}}, "train.schedule.than", "did you mean then"),
        ({"engine": {"workers": [1, 2], "launcher": "local"}}, "train.engine", "launcher: ray"),
        ({"batch": 7, "engine": {"workers": [2, 6]}}, "train", "batch: 8"),
        ({"diverged": {"factor": 1}}, "train.diverged.factor", "greater than 1"),
        ({"data": {"layer": None, "blend": {"short": 1}}}, "train.data", "layer"),
        ({"data": {"blend": {"short": 0}}}, "train.data", "weight"),
        ({"engine": {"strategy": "ddp", "zero": 3}}, "train.engine", "deepspeed"),
        ({"lr": 0}, "train.lr", "greater than 0"),
    ],
)
def test_a_mistake_is_named_with_its_fix(section: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        config(**section)
    assert error.value.field == field


def test_a_recipe_without_the_section() -> None:
    with pytest.raises(RecipeError, match=r"^train: is missing"):
        TrainConfig.from_recipe(Recipe(dataset="ds"))


def test_a_run_may_change_where_and_how_long_it_runs_but_not_what_it_is() -> None:
    same = [{"steps": 99}, {"run": "other"}, {"engine": {"workers": 2}}, {"log_every": 1}, {"data": {"prefetch": 9}}]
    other = [{"lr": 1}, {"seed": 1}, {"batch": 16}, {"tiny": {"width": 3}}, {"data": {"layer": None}}]
    assert {config(**section).fingerprint() for section in same} == {config().fingerprint()}
    assert config().fingerprint() not in {config(**section).fingerprint() for section in other}


def test_the_number_of_workers_may_be_left_to_what_there_is() -> None:
    assert config(batch=24, accumulate=2, engine={"workers": [1, 8]}).world_sizes() == [6, 4, 3, 2, 1]
    assert config(batch=24, engine={"workers": 8}).world_sizes() == [8]


def test_every_family_says_what_a_family_must() -> None:
    for name in FAMILIES:
        family = family_class(name)
        assert family.name == name
        assert not family.__abstractmethods__
        traits = traits_of(name)
        assert (family.settings, family.captions) == (traits.settings, traits.captions)
        assert (family.buckets, family.draws) == (traits.buckets, traits.draws)


def test_the_schema_holds_the_families_sections() -> None:
    assert {"model", "engine", *FAMILIES} <= json_schema()["properties"].keys()


def test_checking_a_recipe_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from capstan.training.config import TrainConfig, json_schema\n"
        "section = {'model': 'diffusion', 'run': 'r', 'steps': 1, 'diffusion': {'autoencoder': 'x'}}\n"
        "TrainConfig.from_section(section), json_schema()\n"
        "print(sorted({'torch', 'ray'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
