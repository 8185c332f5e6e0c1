"""Measured rows → decisions: the recipe's SQL conditions in order, then duplicates, then which shard a kept row is in.

Nothing here touches a picture: thresholds are questions to tables, answered by DuckDB. Conditions see the columns of
`ingest.STAGED_SCHEMA` (without offset and size); `extra` is JSON, so that extra->>'$.license' = 'cc0' asks for a column
of the source.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.blocklist import blocked
from pipeline.config import Condition, Recipe
from pipeline.dedup import CONTAMINATED, EXACT, PERCEPTUAL, SEMANTIC
from pipeline.errors import RecipeError
from pipeline.ingest import STAGED_SCHEMA, Staged
from pipeline.records import DUPLICATE, FAILED, KEPT, REJECTED, REMOVED
from pipeline.repeats import Repeats, find_repeats
from pipeline.storage import Storage

COLUMNS = [name for name in STAGED_SCHEMA.names if name not in ("offset", "size")]
MEMORY_LIMIT = "2GB"
# A row's step; n > 0: rejected by the n-th condition. A row that was kept when it was taken down still holds its place:
# so its neighbours stay in their shards, and what repeats it stays out.
_PLACED, _REMOVED, _FAILED, _PASSED = -3, -2, -1, 0
HELD_PLACE = "kept"  # `detail` of such a row in its staged table


@dataclass(frozen=True)
class Decisions:
    """What becomes of each row, in the order of units and, in a unit, of its table.

    `step` [n] is -1 for a failed row, -2 for one that is blocked or was taken down, 0 for one that meets all
    conditions, or the number of the first it does not meet; `repeats` says of all rows which ones repeat another;
    `shard` [n] is the shard's number, -1 for rows not kept.
    """

    units: list[Staged]
    key: pa.StringArray
    sha256: pa.StringArray
    step: npt.NDArray[np.int64]
    repeats: Repeats
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
        failed, rejected = int((self.step == _FAILED).sum()), int(((self.step > 0) | (self.step == _REMOVED)).sum())
        duplicate, kept = int((self.repeats.kept >= 0).sum()), int((self.shard >= 0).sum())
        rows = {"rows": len(self.step), KEPT: kept, REJECTED: rejected, DUPLICATE: duplicate, FAILED: failed}
        return rows | {"shards": len(np.unique(self.shard[self.shard >= 0]))}

    def columns(self, start: int, stop: int, reason: pa.Array, detail: pa.Array) -> dict[str, list[str]]:
        """The ledger's outcome, reason, detail and shard of rows [start, stop); `reason` and `detail` as staged."""
        found: dict[str, list[str]] = {"outcome": [], "reason": [], "detail": [], "shard": []}
        for row, failure, said in zip(range(start, stop), reason.to_pylist(), detail.to_pylist(), strict=True):
            entry = self._decision(row, failure, said)
            for name, value in zip(found, entry, strict=True):
                found[name].append(value)
        return found

    def _decision(self, row: int, failure: str, said: str) -> tuple[str, str, str, str]:
        if self.step[row] == _FAILED:
            return FAILED, failure, said, ""
        if self.step[row] > 0:
            return REJECTED, self.conditions[self.step[row] - 1], "", ""
        if self.step[row] == _REMOVED:
            return REJECTED, REMOVED, "", ""
        if (original := int(self.repeats.kept[row])) >= 0:
            contaminated = self.repeats.kind[row] == CONTAMINATED
            detail = self.repeats.evaluation[original] if contaminated else self.key[original].as_py()
            return DUPLICATE, self.repeats.reason(row), detail, ""
        return KEPT, "", "", shard_name(int(self.shard[row]))


def shard_name(number: int) -> str:
    return f"shard-{number:06d}"


def decide(recipe: Recipe, storage: Storage, units: list[Staged]) -> Decisions:
    """Apply `recipe.select` and `recipe.dedup` to the rows of `units` (in order).

    Raises RecipeError (select.<name>.where) for a condition that DuckDB does not take.
    """
    check_conditions(recipe.select)
    rows = _ask(recipe.select, storage, units)
    step = rows["step"].to_numpy().astype(np.int64)
    batch = np.repeat([_batch(unit.unit) for unit in units], [unit.rows for unit in units]).astype(np.int64)
    key, sha256 = rows["key"].combine_chunks(), rows["sha256"].combine_chunks()
    unwanted = blocked(recipe, storage)
    if unwanted:
        named = unwanted.hits(*(rows[name].to_pylist() for name in ("key", "url", "sha256")))
        step[np.array(named, bool) & (step >= _FAILED)] = _REMOVED
    placed = step == _PLACED
    repeats = _repeats(recipe, storage, rows, batch, np.flatnonzero((step == _PASSED) | placed), placed)

    shard = _allot(batch, ((step == _PASSED) | placed) & (repeats.kept < 0), recipe.shards.samples)
    shard[placed], step[placed] = -1, _REMOVED
    names = [condition.name for condition in recipe.select]
    funnel = _funnel(recipe, step, names, repeats)
    return Decisions(units, key, sha256, step, repeats, shard, names, funnel)


def _repeats(
    recipe: Recipe,
    storage: Storage,
    rows: pa.Table,
    batch: npt.NDArray[np.int64],
    passed: npt.NDArray[np.int64],
    placed: npt.NDArray[np.bool_],
) -> Repeats:
    """Which of all rows repeat another one; only those that `passed` are compared. One that holds its place (`placed`)
    repeats none."""
    if recipe.dedup.semantic is not None:
        raise RecipeError("score.clip.embeddings", "dedup.semantic needs embeddings, and none are kept", "keep them")
    found = find_repeats(recipe, storage, rows.take(passed), batch[passed])
    kept, kind = np.full(len(rows), -1, np.int64), np.zeros(len(rows), np.int8)
    own = found.kind != CONTAMINATED
    kept[passed] = np.where(own & (found.kept >= 0), passed[np.where(own, found.kept, -1)], found.kept)
    kind[passed] = found.kind
    kept[placed], kind[placed] = -1, 0
    return Repeats(kept, kind, found.evaluation)


def check_conditions(conditions: list[Condition]) -> None:
    """Raise RecipeError for a condition that names an unknown column, or is not SQL, or not a condition."""
    with _connect() as db:
        db.register("rows", STAGED_SCHEMA.empty_table().select(COLUMNS))
        for condition in conditions:
            try:
                kind = str(db.sql(f"SELECT ({condition.where}\n) FROM rows").types[0])
            except duckdb.Error as error:
                raise _explain(condition, error) from None
            if kind != "BOOLEAN":
                mend = "write a comparison, e.g. least(width, height) >= 200"
                raise RecipeError(f"select.{condition.name}.where", f"gives {kind.lower()}, not yes or no", mend)


def _ask(conditions: list[Condition], storage: Storage, units: list[Staged]) -> pa.Table:
    """key, step, area, url, sha256, phash, colours of every row, in order."""
    cases = "".join(
        f" WHEN NOT coalesce(({condition.where}\n), false) THEN {number}"
        for number, condition in enumerate(conditions, 1)
    )
    query = f"""
        SELECT key, CASE WHEN reason = '{REMOVED}' THEN if(detail = '{HELD_PLACE}', {_PLACED}, {_REMOVED})
                         WHEN reason <> '' THEN {_FAILED}{cases} ELSE {_PASSED} END AS step,
               original_width::BIGINT * original_height AS area, url, sha256, phash, colours
        FROM rows ORDER BY unit, key
    """
    with _connect() as db:
        db.register("rows", storage.dataset([unit.table for unit in units], STAGED_SCHEMA))
        try:
            return db.sql(query).to_arrow_table()
        except duckdb.Error as error:
            raise _explain(_culprit(db, conditions), error) from None


def _culprit(db: duckdb.DuckDBPyConnection, conditions: list[Condition]) -> Condition:
    """The first condition that fails on the rows by itself."""
    for condition in conditions:
        try:
            db.sql(f"SELECT count(*) FROM rows WHERE reason = '' AND ({condition.where}\n)").fetchall()
        except duckdb.Error:
            return condition
    return conditions[-1]


def _connect() -> duckdb.DuckDBPyConnection:
    """A database that can see the registered rows and nothing else."""
    db = duckdb.connect(config={"memory_limit": MEMORY_LIMIT, "enable_external_access": False})
    db.execute("SET enable_progress_bar = false")  # it would go to stdout, which carries the summary only
    return db


def _explain(condition: Condition, error: duckdb.Error) -> RecipeError:
    message = str(error).splitlines()[0]
    mend = "correct the SQL"
    if unknown := re.search(r'column "([^"]+)" not found', message):
        near = difflib.get_close_matches(unknown[1], COLUMNS, n=3, cutoff=0.4)
        mend = f"did you mean {' or '.join(near)}?" if near else f"columns: {', '.join(COLUMNS)}"
        message = f"no column {unknown[1]!r}"
    return RecipeError(f"select.{condition.name}.where", message, mend)


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


def _funnel(recipe: Recipe, step: npt.NDArray[np.int64], names: list[str], repeats: Repeats) -> list[dict[str, Any]]:
    """Rows left after each step, and rows that the step took."""

    def repeating(kind: int) -> int:
        return int((repeats.kind == kind).sum())

    losses = [("fetched and decoded", int((step == _FAILED).sum()))]
    if removed := int((step == _REMOVED).sum()):
        losses.append((REMOVED, removed))
    losses += [(name, int((step == number).sum())) for number, name in enumerate(names, 1)]
    if recipe.dedup.decontaminate is not None:
        losses.append(("in the evaluation set", repeating(CONTAMINATED)))
    losses += [("exact duplicates", repeating(EXACT)), ("near duplicates", repeating(PERCEPTUAL))]
    if recipe.dedup.semantic is not None:
        losses.append(("semantic duplicates", repeating(SEMANTIC)))
    funnel, left = [{"step": "rows", "left": len(step), "lost": 0}], len(step)
    for name, lost in losses:
        left -= lost
        funnel.append({"step": name, "left": left, "lost": lost})
    return funnel
