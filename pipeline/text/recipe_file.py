"""A recipe file and `--set a.b=value` → plain data"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.text import safe_yaml


def read_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file as plain data and apply `a.b=value` overrides (values are YAML).

    Raises RecipeError if the file cannot be read or is not a YAML mapping.
    """
    file = Path(path)
    try:
        raw = safe_yaml.parse_file(file)
    except FileNotFoundError:
        raise RecipeError("RECIPE", f"no file {file}", "check the path, or write one with `capstan init`") from None
    except OSError as error:
        raise RecipeError("RECIPE", f"cannot read {file} ({error.strerror})", "choose a readable YAML file") from None
    except safe_yaml.InvalidYaml as error:
        raise RecipeError("RECIPE", f"{file} is not valid YAML: {error}", "correct the file") from None
    if not isinstance(raw, dict):
        raise RecipeError("RECIPE", f"{file} is not a mapping", "start from `capstan init`")
    return apply_overrides(raw, overrides)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=value` overrides to `raw` in place and return it."""
    for override in overrides:
        _apply(raw, override)
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError("--set", f"{override!r} is not a.b=value", "use e.g. --set image.size=256")
    *parents, last = name.split(".")
    node = raw
    for depth, parent in enumerate(parents):
        inner = node.get(parent)
        if inner is None:
            inner = node[parent] = {}
        if not isinstance(inner, dict):
            raise RecipeError("--set", f"{'.'.join(parents[: depth + 1])} is not a section", "name a key of a section")
        node = inner
    try:
        node[last] = safe_yaml.parse(text)
    except safe_yaml.InvalidYaml as error:
        raise RecipeError("--set", f"the value of {name} is not valid YAML ({error})", "quote it") from None
