"""Plain data → a section of the recipe, or an error that names the field and the fix"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from capstan.pipeline.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """A part of the recipe: frozen, and with no room for unknown keys.

    The string below a key is its description in the JSON Schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


def without_unset(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Leave out null values of these names."""
    return {name: value for name, value in values.items() if value is not None or name not in names}


def validate(model: type[Model], raw: Any, where: str = "") -> Model:
    """Return `raw` as a `model`. Raises RecipeError naming the first wrong field (dotted, below `where`)."""
    if not isinstance(raw, Mapping):
        hint = f"set e.g. {where}: {example_of(model)}" if where else "write `key: value` lines"
        raise RecipeError(where or "recipe", "must be a mapping of keys to values", hint)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = _place(model, first["loc"])
        field = ".".join([where] * bool(where) + place.path) or "recipe"
        raise RecipeError(field, *_explain(place, first)) from None


@dataclass(frozen=True)
class _Place:
    """A place in the recipe: its keys, the section that holds the last one, and a value for it as YAML."""

    path: list[str]
    section: type[BaseModel] | None
    example: str


def _place(model: type[BaseModel], loc: Sequence[Any]) -> _Place:
    """Return the place of a pydantic location, which also names the alternatives that were tried."""
    path, example = list[str](), ""
    kind: Any = None
    holder: type[BaseModel] | None = model
    section: type[BaseModel] | None = model  # that has the next key
    for part in loc:
        holder, field = section, section.model_fields.get(str(part)) if section is not None else None
        if field is not None:
            path, kind, example = [*path, str(part)], field.annotation, _example_of_field(field)
            section = _section_in(kind)
        elif isinstance(part, int) or section is not None or (values := _values_of(kind)) is not None:
            path.append(str(part))  # a place in a list, an unknown key, or a key of the user's own
            if not isinstance(part, int) and section is None:
                kind, example = values, example_of(values)
    return _Place(path, holder, example)


def _explain(place: _Place, error: Any) -> tuple[str, str]:
    """Turn a pydantic error into (problem, hint)."""
    kind, value = error["type"], error.get("input")
    name = place.path[-1] if place.path else "recipe"
    if kind == "extra_forbidden" and place.section is not None:
        known = list(place.section.model_fields)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"remove it; known keys: {', '.join(known)}" if known else "remove it; there are no keys here"
        return "unknown key", f"did you mean {near[0]}?" if near else hint
    named = next((part for part in reversed(place.path) if not part.isdigit()), "recipe")
    if kind == "missing":
        return "is missing", f"{'set' if name.isdigit() else 'add it,'} e.g. {named}: {place.example}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        return message, "correct the recipe"
    typed = kind.endswith(("_type", "_parsing", "literal_error"))
    return f"{message} (found {_short(value)})", f"set e.g. {named}: {place.example}" if typed else "correct the value"


def example_of(kind: Any) -> str:
    """Return a value of a type as YAML.

    >>> example_of(int), example_of(str | list[str] | None), example_of(dict[str, float]), example_of(bool)
    ('8', 'text', '{name: 0.5}', 'true')
    """
    origin, inner = get_origin(kind), [part for part in get_args(kind) if part not in (type(None), ...)]
    if origin is Literal:
        return str(inner[0])
    if origin in (list, tuple):
        return f"[{', '.join(map(example_of, inner))}]"
    if origin is dict:
        return f"{{name: {example_of(inner[1])}}}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        keys = [(name, field) for name, field in kind.model_fields.items() if field.is_required()]
        keys = keys or list(kind.model_fields.items())[:1]
        return f"{{{', '.join(f'{name}: {_example_of_field(field)}' for name, field in keys)}}}"
    if inner:  # a union, or an annotated type
        return example_of(inner[0])
    names: dict[Any, str] = {int: "8", float: "0.5", bool: "true", str: "text"}
    return names.get(kind, "value")


def _example_of_field(field: FieldInfo) -> str:
    """Return the first of a key's examples, else its default, else a value of its type."""
    value = field.examples[0] if field.examples else None if field.is_required() else field.get_default()
    if value in (None, [], {}) or isinstance(value, BaseModel):
        return example_of(field.annotation)
    return json.dumps(value, default=lambda model: model.model_dump(mode="json")).replace('"', "")


def _values_of(kind: Any) -> Any:
    """Return the type of the values, if a type is or may be a mapping; else None."""
    return next((get_args(part)[1] for part in _walk_types(kind) if get_origin(part) is dict), None)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the first section among the types of an annotation."""
    return next((a for a in _walk_types(annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)


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
