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
from capstan.training.config import TrainConfig, json_schema
from capstan.training.config.families import FAMILIES
from capstan.training.experiment.config import ExperimentConfig
from capstan.training.lecture.config import LectureConfig

log = logging.getLogger(__name__)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe at `path` with `a.b=value` overrides.

    Raises RecipeError for a mistake in any section. Loads no torch, but for a model family of the user's own; without
    the extra `train`, the settings of such a family are not checked, and the log says so.
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
    if recipe.train is not None and _needs_torch(recipe.train) and extras.missing(extras.TRAIN) is not None:
        log.info("train: the section is not checked, as model %s needs the extra train", recipe.train["model"])
        return recipe
    if recipe.train is not None:
        TrainConfig.from_recipe(recipe)
    if recipe.experiment is not None:
        ExperimentConfig.from_recipe(recipe)
    if recipe.lecture is not None:
        LectureConfig.from_recipe(recipe)
    return recipe


def _needs_torch(section: dict[str, Any]) -> bool:
    """Return whether the section train names a family of the user's own, whose settings come with its model."""
    return ":" in str(section.get("model")) and section["model"] not in FAMILIES


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the whole recipe, for editors."""
    whole = Recipe.model_json_schema()
    definitions = whole.setdefault("$defs", {})
    for section, inner in (
        ("recaption", RecaptionConfig.model_json_schema()),
        ("train", json_schema()),
        ("experiment", ExperimentConfig.model_json_schema()),
        ("lecture", LectureConfig.model_json_schema()),
    ):
        definitions.update(inner.pop("$defs", {}))
        definitions[inner["title"]] = inner
        described = {"description": whole["properties"][section]["description"]}
        either = [{"$ref": f"#/$defs/{inner['title']}"}, {"type": "null"}]
        whole["properties"][section] = described | {"anyOf": either}
    return whole


def settings(incomplete: str) -> list[str]:
    """Return what A.B=VALUE may become: keys of the recipe, one section at a time, then a key's known values."""
    whole = schema()
    key, equals, value = incomplete.partition("=")
    *parents, last = key.split(".")
    sections = [whole]
    for parent in parents:
        sections = [
            inner
            for section in sections
            for inner in _alternatives(section.get("properties", {}).get(parent, {}), whole)
        ]
    keys = {name: inner for section in sections for name, inner in section.get("properties", {}).items()}
    start = "".join(f"{parent}." for parent in parents)
    if equals:
        known = [text for inner in _alternatives(keys.get(last, {}), whole) for text in _values(inner)]
        return [f"{key}={text}" for text in known if text.startswith(value)]
    found = {name: _alternatives(inner, whole) for name, inner in keys.items() if name.startswith(last)}
    ends = {name: "." if any("properties" in one for one in inner) else "=" for name, inner in found.items()}
    return [f"{start}{name}{end}" for name, end in ends.items()]


def _alternatives(part: dict[str, Any], whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas that a schema stands for, without references."""
    if "$ref" in part:
        return _alternatives(whole["$defs"][part["$ref"].removeprefix("#/$defs/")], whole)
    either = part.get("anyOf")
    return [part] if either is None else [inner for one in either for inner in _alternatives(one, whole)]


def _values(part: dict[str, Any]) -> list[str]:
    """Return the values that a schema lists."""
    if part.get("type") == "boolean":
        return ["true", "false"]
    return ["null"] if part.get("type") == "null" else [str(value) for value in part.get("enum", [])]
