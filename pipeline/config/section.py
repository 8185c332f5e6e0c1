"""Plain data → a section of the recipe, or an error that names the field and the fix"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from capstan.pipeline.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """A part of the recipe: frozen, and with no room for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def without_unset(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Leave out null values of these names."""
    return {name: value for name, value in values.items() if value is not None or name not in names}


def validate(model: type[Model], raw: Any, where: str = "") -> Model:
    """Return `raw` as a `model`. Raises RecipeError naming the first wrong field (dotted, below `where`)."""
    if not isinstance(raw, Mapping):
        raise RecipeError(where or "recipe", "must be a mapping of keys to values", "write `key: value` lines")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([where] * bool(where) + [str(part) for part in first["loc"]]) or "recipe"
        raise RecipeError(field, *_explain(model, first)) from None


def _explain(model: type[BaseModel], error: Any) -> tuple[str, str]:
    """Turn a pydantic error into (problem, hint)."""
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        known = _sibling_keys(model, error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"remove it; known keys: {', '.join(known)}"
        return "unknown key", hint
    if kind == "missing":
        return "is missing", "add it to the recipe"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        return message, "correct the recipe"
    return f"{message} (found {_short(value)})", "correct the value"


def _sibling_keys(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """Return the keys that are allowed at the level of `loc`."""
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # an index into a list
        inner = [a for a in _walk_types(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        if inner:
            model = inner[0]
    return list(model.model_fields)


def _walk_types(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", ())
    return [annotation] + [inner for argument in arguments for inner in _walk_types(argument)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fingerprint(value: Any) -> str:
    """Return a 64-bit hash of `value` (plain data or a pydantic model) as 16 hexadecimal digits."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
