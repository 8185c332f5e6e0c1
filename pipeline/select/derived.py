"""What ledger and shard tables have besides: columns derived from the rows' other columns (`extra`)

`license` if the recipe names the source's licences; the facts of clips if it names the parts of its samples. Nothing of
this is staged: another setting fetches nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Final

import pyarrow as pa

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.parts import PARTS
from capstan.pipeline.select import licenses
from capstan.pipeline.select.licenses import LICENSE

# Of the clip that a row is: where it lies in the source video `parent`, and its format; zeros and "" where unknown.
CLIP_FACTS: Final = [
    pa.field("fps", pa.float64(), nullable=False),
    pa.field("frames", pa.int32(), nullable=False),
    pa.field("start_s", pa.float64(), nullable=False),
    pa.field("end_s", pa.float64(), nullable=False),
    pa.field("parent", pa.string(), nullable=False),
    pa.field("codec", pa.string(), nullable=False),
    pa.field("sample_rate", pa.int32(), nullable=False),
    pa.field("channels", pa.int32(), nullable=False),
]
_MOST: Final = {pa.int32(): 2**31 - 1, pa.float64(): 1e12}
_LONGEST: Final = 200  # characters


def derived_fields(recipe: Recipe) -> list[pa.Field]:
    """Return the columns that the recipe adds."""
    return [*licenses.license_fields(licenses.setting_of(recipe)), *(CLIP_FACTS if parts_of(recipe) else [])]


def fields_of(manifest_recipe: Mapping[str, Any]) -> list[pa.Field]:
    """Return the same for the recipe that a manifest holds."""
    return [*licenses.fields_of(manifest_recipe), *(CLIP_FACTS if parts_of_manifest(manifest_recipe) else [])]


def identity(recipe: Recipe) -> list[Any]:
    """Return what the columns depend on besides the rows, as plain data; [] if there are none."""
    return [*licenses.identity(licenses.setting_of(recipe)), *([parts_of(recipe)] if parts_of(recipe) else [])]


def derived_columns(extra: pa.ChunkedArray, recipe: Recipe, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return the columns (those of `names`) of rows, by their other columns as JSON."""
    found: dict[str, Any] = {}
    setting = licenses.setting_of(recipe)
    if setting is not None and (names is None or LICENSE.name in names):
        found[LICENSE.name] = licenses.licenses(extra, setting)
    facts = [field for field in CLIP_FACTS if parts_of(recipe) and (names is None or field.name in names)]
    if facts:
        rows = [json.loads(text) for text in extra.to_pylist()]
        found |= {field.name: pa.array([_fact(row, field) for row in rows], field.type) for field in facts}
    return found


def parts_of_manifest(manifest_recipe: Mapping[str, Any]) -> list[str]:
    """Return the same for the recipe that a manifest holds."""
    wanted = (manifest_recipe.get("source") or {}).get("parts") or []
    return [part for part in PARTS if part in wanted]


def parts_of(recipe: Recipe) -> list[str]:
    """Return the parts of samples that the recipe carries, in the order of tars."""
    wanted = (recipe.source.parts if recipe.source is not None else None) or []
    return [part for part in PARTS if part in wanted]


def _fact(row: Mapping[str, Any], field: pa.Field) -> Any:
    """Return a field of a row's JSON, as far as it has the column's type: anyone may have written it."""
    value = row.get(field.name)
    if field.type == pa.string():
        return value[:_LONGEST] if isinstance(value, str) else ""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    number = number if abs(number) <= _MOST[field.type] else 0
    return float(number) if field.type == pa.float64() else int(number)
