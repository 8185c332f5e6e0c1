"""Measured rows → decisions: the recipe's steps in order, then duplicates, then which shard a kept row is in.

Nothing here touches a picture: thresholds are questions to tables (pipeline.conditions, pipeline.sampling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.conditions import FAILED as _FAILED
from pipeline.conditions import PASSED as _PASSED
from pipeline.conditions import ask, check_conditions
from pipeline.config import Recipe
from pipeline.dedup import find_duplicates, precedence
from pipeline.ingest import Staged
from pipeline.records import DUPLICATE, FAILED, KEPT, REJECTED
from pipeline.sampling import sample
from pipeline.storage import Storage

_KINDS: Final = ["perceptual", "exact"]  # of a duplicate, by `exact`


@dataclass(frozen=True)
class Decisions:
    """What becomes of each row, in the order of units and, in a unit, of its table.

    `step` [n] is -1 for a failed row, 0 for one that meets all conditions, or the number of the first it does not meet;
    `kept` [n] is the row that a duplicate repeats, else -1; `shard` [n] is the shard's number, -1 for rows not kept.
    """

    units: list[Staged]
    key: npt.NDArray[np.bytes_]  # [n], 16 raw bytes
    sha256: npt.NDArray[np.bytes_]  # [n], 32 raw bytes
    step: npt.NDArray[np.int16]
    kept: npt.NDArray[np.int64]
    exact: npt.NDArray[np.bool_]
    shard: npt.NDArray[np.int64]
    conditions: list[str]
    funnel: list[dict[str, Any]]

    @property
    def starts(self) -> list[int]:
        """Where each unit's rows begin; one more at the end."""
        return np.concatenate([[0], np.cumsum([unit.rows for unit in self.units])]).astype(int).tolist()

    @property
    def counts(self) -> dict[str, int]:
        """Rows by outcome."""
        failed, rejected = int((self.step == _FAILED).sum()), int((self.step > 0).sum())
        duplicate, kept = int((self.kept >= 0).sum()), int((self.shard >= 0).sum())
        rows = {"rows": len(self.step), KEPT: kept, REJECTED: rejected, DUPLICATE: duplicate, FAILED: failed}
        return rows | {"shards": int(self.shard.max(initial=-1)) + 1}

    def keys(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Keys of these rows, hexadecimal."""
        return _hex(self.key[rows])

    def hashes(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """SHA-256 of these rows' source files, hexadecimal."""
        return _hex(self.sha256[rows])

    def columns(self, start: int, stop: int, reason: pa.Array, detail: pa.Array) -> dict[str, pa.Array]:
        """The ledger's outcome, reason, detail and shard of rows [start, stop); `reason` and `detail` as staged."""
        step, kept, shard = self.step[start:stop], self.kept[start:stop], self.shard[start:stop]
        failed, repeats = step == _FAILED, kept >= 0
        outcome = np.select([failed, step > 0, repeats], [0, 1, 2], 3)
        why = np.select([step > 0, repeats], [step, len(self.conditions) + 1 + self.exact[start:stop]], 0)
        of_whom = np.full(len(step), "", object)
        of_whom[repeats] = self.keys(kept[repeats])
        first = max(int(shard.min(where=shard >= 0, initial=np.iinfo(np.int64).max)), 0) if (shard >= 0).any() else 0
        names = ["", *(shard_name(number) for number in range(first, int(shard.max(initial=-1)) + 1))]
        return {
            "outcome": _texts([FAILED, REJECTED, DUPLICATE, KEPT], outcome),
            "reason": pc.if_else(pa.array(failed), reason, _texts(["", *self.conditions, *_KINDS], why)),
            "detail": pc.if_else(pa.array(failed), detail, pa.array(of_whom, pa.string())),
            "shard": _texts(names, np.where(shard >= 0, shard - first + 1, 0)),
        }


def _texts(names: list[str], index: npt.NDArray[Any]) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(index, pa.int64()))


def _hex(raw: npt.NDArray[np.bytes_]) -> list[str]:
    width = 2 * raw.dtype.itemsize
    text = np.ascontiguousarray(raw).tobytes().hex()
    return [text[start : start + width] for start in range(0, len(text), width)]


def shard_name(number: int) -> str:
    return f"shard-{number:06d}"


def decide(recipe: Recipe, storage: Storage, units: list[Staged]) -> Decisions:
    """Apply `recipe.select` and `recipe.dedup` to the rows of `units` (in order).

    Raises RecipeError (select.<name>.where) for a condition that DuckDB does not take.
    """
    check_conditions(recipe)
    rows = ask(recipe, storage, units)
    batch = np.repeat([_batch(unit.unit) for unit in units], [unit.rows for unit in units]).astype(np.int64)
    step = sample(recipe.select, rows, batch)
    kept, exact = np.full(len(step), -1, np.int64), np.zeros(len(step), bool)

    (passed,) = np.nonzero(step == _PASSED)
    # In a batch rows come by key: their place says which key is smaller.
    order = precedence(batch[passed], rows.area[passed], np.arange(len(passed)))
    found = find_duplicates(
        order,
        rows.sha256[passed],
        rows.phash[passed],
        exact=recipe.dedup.exact,
        distance=recipe.dedup.perceptual,
    )
    kept[passed] = np.where(found.kept >= 0, passed[found.kept], -1)
    exact[passed] = found.exact

    shard = _allot(batch, (step == _PASSED) & (kept < 0), recipe.shards.samples)
    names = [condition.name for condition in recipe.select]
    funnel = _funnel(step, names, kept, exact)
    return Decisions(units, rows.key, rows.sha256, step, kept, exact, shard, names, funnel)


def _batch(unit: str) -> int:
    return int(unit.partition("-")[0])


def _allot(batch: npt.NDArray[np.int64], kept: npt.NDArray[np.bool_], samples: int) -> npt.NDArray[np.int64]:
    """The shard of each kept row, -1 elsewhere: batch by batch, as few shards as hold them, sizes that differ by one
    at most. A batch's shards hold its rows only, so that a new batch moves none."""
    shard = np.full(len(batch), -1, np.int64)
    first = 0
    for number in np.unique(batch):
        (rows,) = np.nonzero(kept & (batch == number))
        count = -(-len(rows) // samples)
        for part in np.array_split(rows, count) if count else []:
            shard[part] = first
            first += 1
    return shard


def _funnel(
    step: npt.NDArray[np.int16], names: list[str], kept: npt.NDArray[np.int64], exact: npt.NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """Rows left after each step, and rows that the step took."""
    losses = [("fetched and decoded", int((step == _FAILED).sum()))]
    losses += [(name, int((step == number).sum())) for number, name in enumerate(names, 1)]
    losses += [("exact duplicates", int(exact.sum())), ("near duplicates", int(((kept >= 0) & ~exact).sum()))]
    funnel, left = [{"step": "rows", "left": len(step), "lost": 0}], len(step)
    for name, lost in losses:
        left -= lost
        funnel.append({"step": name, "left": left, "lost": lost})
    return funnel
