"""The rows' licences: what the source says in `extra` → the column `license`, as SPDX license expressions

The column is there if the recipe sets `source.license`. It is derived, not staged: naming another column of the source
fetches nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa

from capstan.pipeline.config import OneLicense, Recipe
from capstan.pipeline.text.spdx import VERSION, spdx

LICENSE: Final = pa.field("license", pa.string(), nullable=False)

Setting = str | OneLicense | None  # source.license: the name of a column, or one licence for all rows


def setting_of(recipe: Recipe) -> Setting:
    """Return the recipe's `source.license`."""
    return None if recipe.source is None else recipe.source.license


def license_fields(setting: Setting | Mapping[str, Any]) -> list[pa.Field]:
    """Return what ledger and shard tables have in addition, by the recipe's or a manifest's `source.license`."""
    return [] if setting is None else [LICENSE]


def fields_of(manifest_recipe: Mapping[str, Any]) -> list[pa.Field]:
    """Return the same for the recipe that a manifest holds."""
    return license_fields((manifest_recipe.get("source") or {}).get("license"))


def identity(setting: Setting) -> list[Any]:
    """Return what the column depends on besides the rows, as plain data; [] if there is no such column."""
    if setting is None:
        return []
    return [VERSION, setting if isinstance(setting, str) else setting.model_dump(mode="json")]


def licenses(extra: pa.ChunkedArray, setting: str | OneLicense) -> pa.Array:
    """Return the licence of each row, by its other columns (JSON)."""
    if isinstance(setting, OneLicense):
        return pa.repeat(spdx(setting.all), len(extra))
    marker = json.dumps(setting, ensure_ascii=False)
    return pa.array([spdx(_text(fields, setting, marker)) for fields in extra.to_pylist()], pa.string())


def _text(extra: str, name: str, marker: str) -> str:
    """Return a field of a JSON object as text; "" if it has none."""
    if marker not in extra:
        return ""
    value = json.loads(extra).get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
