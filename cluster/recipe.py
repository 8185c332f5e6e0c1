"""The whole recipe, every floor's section checked at once: the front door's loader, and its JSON Schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capstan.pipeline.config import Recipe, apply_overrides, read_recipe, validate
from capstan.pipeline.secrets import refuse_secrets
from capstan.recaption.config import RecaptionConfig
from capstan.training.config import TrainConfig, json_schema
from capstan.training.experiment.config import ExperimentConfig


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe at `path` with `a.b=value` overrides. Raises RecipeError if any section is wrong."""
    return _checked(read_recipe(path, overrides))


def loaded(raw: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a mapping with `a.b=value` overrides. Raises RecipeError if any section is wrong."""
    return _checked(apply_overrides(raw, overrides))


def _checked(raw: dict[str, Any]) -> Recipe:
    refuse_secrets({name: raw.get(name) for name in ("dataset", "storage", "source")}, "")
    recipe = validate(Recipe, raw)
    if recipe.recaption is not None:
        validate(RecaptionConfig, recipe.recaption, "recaption")
    if recipe.train is not None:
        TrainConfig.from_recipe(recipe)
    if recipe.experiment is not None:
        ExperimentConfig.from_recipe(recipe)
    return recipe


def schema() -> dict[str, Any]:
    """The JSON Schema of the whole recipe, for editors."""
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
