"""Recipe file → validated recipe, with every floor's section checked; and its JSON Schema"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capstan.pipeline import extras
from capstan.pipeline.config import Recipe, validate
from capstan.pipeline.secrets import refuse_secrets
from capstan.pipeline.text.recipe_file import apply_overrides, read_recipe
from capstan.recaption.config import RecaptionConfig
from capstan.training.config import FAMILIES, TrainConfig, json_schema
from capstan.training.experiment.config import ExperimentConfig

log = logging.getLogger(__name__)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe at `path` with `a.b=value` overrides.

    Raises RecipeError for a mistake in any section. Without the extra `train`, the model's own settings in the section
    train are not checked; the log says so.
    """
    return _checked(read_recipe(path, overrides))


def loaded(raw: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a mapping with `a.b=value` overrides. Raises RecipeError as `load` does."""
    return _checked(apply_overrides(raw, overrides))


def _checked(raw: dict[str, Any]) -> Recipe:
    refuse_secrets(raw, "")
    recipe = validate(Recipe, raw)
    if recipe.recaption is not None:
        RecaptionConfig.from_recipe(recipe)
    if recipe.train is not None:
        if extras.missing(extras.TRAIN) is None:
            TrainConfig.from_recipe(recipe)
        else:
            _check_without_model(recipe.train)
    if recipe.experiment is not None:
        if extras.missing(extras.TRAIN) is None:
            ExperimentConfig.from_recipe(recipe)
        else:
            validate(ExperimentConfig, recipe.experiment, "experiment")
    return recipe


def _check_without_model(section: dict[str, Any]) -> None:
    """Check the section train but for the model's own settings, whose classes import torch."""
    model = section.get("model")
    if model in FAMILIES:
        validate(TrainConfig, {key: value for key, value in section.items() if key not in FAMILIES}, "train")
    log.info("train: the settings of model %s are not checked, as the extra train is not installed", model)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the whole recipe, for editors. Raises MissingExtra without the extra `train`."""
    extras.require(extras.TRAIN, "schema")
    whole = Recipe.model_json_schema()
    definitions = whole.setdefault("$defs", {})
    for section, inner in (
        ("recaption", RecaptionConfig.model_json_schema()),
        ("train", json_schema()),
        ("experiment", ExperimentConfig.model_json_schema()),
    ):
        definitions.update(inner.pop("$defs", {}))
        definitions[inner["title"]] = inner
        whole["properties"][section] = {"anyOf": [{"$ref": f"#/$defs/{inner['title']}"}, {"type": "null"}]}
    return whole
