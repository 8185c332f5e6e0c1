"""Staged rows made by hand, and the decisions on them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.dataset.shards import sha256_of
from capstan.pipeline.ingest.job import STAGED_SCHEMA, Staged
from capstan.pipeline.select.decide import Decisions, decide
from capstan.pipeline.storage import Storage


def stage(storage: Storage, unit: str, rows: list[dict[str, Any]]) -> Staged:
    """A staged unit with these measurements; other columns are ordinary and unique."""
    full = []
    for number, row in enumerate(rows):
        plain = {
            name: "" if kind == pa.string() else 0
            for name, kind in zip(STAGED_SCHEMA.names, STAGED_SCHEMA.types, strict=True)
        }
        own = {"key": key(unit, number), "unit": unit, "width": 256, "height": 256, "extra": "{}"}
        own |= {"original_width": 500, "original_height": 500, "sha256": sha256_of(f"{unit}-{number}".encode())}
        own |= {"phash": int(fingerprint([unit, number]), 16)}
        full.append(plain | own | row)
    name = f"staged/{unit}.parquet"
    storage.write_table(name, pa.Table.from_pylist(full, schema=STAGED_SCHEMA))
    return Staged(unit, name, "some.tar", len(rows))


def key(unit: str, number: int) -> str:
    """Return keys that sort in the order of staging."""
    return f"{fingerprint(unit)}{number:016x}"


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"dataset": "unused", **sections})


def outcomes(decisions: Decisions) -> list[tuple[str, str, str, str]]:
    """Return (outcome, reason, detail, shard) of each row; reason and detail of failed rows are None."""
    columns = decisions.columns(0, len(decisions.step))
    return list(zip(*(column.to_pylist() for column in columns.values()), strict=True))


def scored(storage: Storage, unit: Staged, scores: list[float | None]) -> Staged:
    """Return the unit with a clip_score for every row."""
    name = f"scores/x/{unit.unit}.parquet"
    storage.write_table(name, pa.table({"clip_score": pa.array(scores, pa.float32()), "error": [""] * len(scores)}))
    return replace(unit, scores=(("clip", name),))


def survivors(storage: Storage, units: list[Staged], *conditions: dict[str, Any]) -> list[int]:
    """Return the rows that meet all conditions; the recipe has clip scores."""
    decisions = decide(recipe(select=list(conditions), score={"clip": {}}), storage, units)
    return np.nonzero(decisions.step == 0)[0].tolist()
