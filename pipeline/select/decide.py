"""Measured rows → decisions and the funnel: conditions, duplicates, shards.

No image is read here: thresholds are queries on tables (select.conditions, select.sampling).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Recipe
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.records import DUPLICATE, FAILED, KEPT, REJECTED, REMOVED
from capstan.pipeline.score.store import DESCRIPTORS, EMBEDDINGS, check_vectors, embeddings
from capstan.pipeline.select.arrays.large_arrays import (
    count,
    empty,
    filled,
    joined,
    pieces,
    release,
    taken,
    tally,
    which,
)
from capstan.pipeline.select.conditions import (
    BLOCKED,
    PASSED,
    TOMBSTONE,
    QueryResult,
    check_conditions,
)
from capstan.pipeline.select.conditions import FAILED as _FAILED
from capstan.pipeline.select.dedup import Embeddings, Meet, Repeats, find_repeats, renumbered
from capstan.pipeline.select.evaluate import evaluate_conditions
from capstan.pipeline.select.near_duplicates import CONTAMINATED, COPIES, EXACT, NONE, PERCEPTUAL, REASONS, SEMANTIC
from capstan.pipeline.select.pairs import apart
from capstan.pipeline.select.sampling import sample
from capstan.pipeline.select.semantic.on_workers import VectorFiles
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch


@dataclass(frozen=True)
class Decided(ABC):
    """Rows with their shards, in the order of units and, within a unit, of its table.

    `shard` [n] is the shard's number, -1 for rows not kept.
    """

    units: list[Staged]
    key: npt.NDArray[np.bytes_]  # [n], 16 raw bytes; then those of earlier batches' rows that are repeated
    sha256: npt.NDArray[np.bytes_]  # [n], 32 raw bytes
    shard: npt.NDArray[np.int64]

    @property
    def starts(self) -> list[int]:
        """Index of each unit's first row, then the number of rows."""
        return np.concatenate([[0], np.cumsum([unit.rows for unit in self.units])]).astype(int).tolist()

    def keys(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Return the keys of these rows, hexadecimal."""
        return _hex(self.key[rows])

    def hashes(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Return the SHA-256 of these rows' source files, hexadecimal."""
        return _hex(self.sha256[rows])

    @abstractmethod
    def columns(self, start: int, stop: int) -> dict[str, pa.Array]:
        """Return the ledger's outcome, reason, detail and shard of rows [start, stop).

        Reason and detail are null for failed rows: theirs are in the staged table.
        """


@dataclass(frozen=True)
class Decisions(Decided):
    """The decision on each row.

    `step` [n] is -1 for a failed row, -2 for a row that is blocked or was taken down, 0 for a row that meets all
    conditions, or the number of the first condition it does not meet. `repeats` lists the rows that repeat another.
    """

    step: npt.NDArray[np.int16]
    repeats: Repeats
    conditions: list[str]
    funnel: list[dict[str, Any]]
    settled: bool  # no row that was taken down, and holds its place, would repeat another

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows by outcome, and number of shards."""
        steps, kinds = tally(self.step), tally(self.repeats.kind)
        outcomes = {
            KEPT: count(len(self.shard), lambda piece: self.shard[piece] >= 0),
            REJECTED: sum(rows for step, rows in steps.items() if step > 0 or step == BLOCKED),
            DUPLICATE: sum(rows for kind, rows in kinds.items() if kind != NONE),
            FAILED: steps[_FAILED],
        }
        return {"rows": len(self.step), **outcomes, "shards": len(shard_rows(self.shard))}

    def columns(self, start: int, stop: int) -> dict[str, pa.Array]:
        step, kept, shard = self.step[start:stop], self.repeats.kept[start:stop], self.shard[start:stop]
        kind = self.repeats.kind[start:stop]
        failed, repeats, gone = step == _FAILED, kept >= 0, step == BLOCKED
        reasons = ["", *self.conditions, REMOVED, *REASONS]
        outcome = np.select([failed, (step > 0) | gone, repeats], [0, 1, 2], 3)
        first_kind = len(self.conditions) + 2
        why = np.select([step > 0, gone, repeats], [step, first_kind - 1, first_kind + kind], 0)
        repeated = np.full(len(step), "", object)
        contaminated = kind == CONTAMINATED
        repeated[repeats & ~contaminated] = self.keys(kept[repeats & ~contaminated])
        repeated[contaminated] = [self.repeats.evaluation[number] for number in kept[contaminated]]
        first = max(int(shard.min(where=shard >= 0, initial=np.iinfo(np.int64).max)), 0) if (shard >= 0).any() else 0
        names = ["", *(shard_name(number) for number in range(first, int(shard.max(initial=-1)) + 1))]
        return {
            "outcome": _texts([FAILED, REJECTED, DUPLICATE, KEPT], outcome),
            "reason": pc.if_else(pa.array(failed), pa.scalar(None, pa.string()), _texts(reasons, why)),
            "detail": pc.if_else(pa.array(failed), pa.scalar(None, pa.string()), pa.array(repeated, pa.string())),
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


class Earlier(Protocol):
    """The shards and the kept rows of earlier batches, to which the rows of new ones are added."""

    shards: int
    keys: npt.NDArray[np.bytes_]  # of the rows that are repeated, once `meet` is called; 16 raw bytes

    @property
    def meet(self) -> Meet:
        """Return the function that finds rows that new rows repeat, by their numbers in `keys`."""


def decide(
    recipe: Recipe,
    storage: Storage,
    units: list[Staged],
    *,
    earlier: Earlier | None = None,
    may_write: bool = False,
    progress: bool = True,
) -> Decisions:
    """Apply `recipe.select` and `recipe.dedup` to the rows of `units`, which are ordered by batch.

    With `earlier`, these are the rows of new batches. Many rows are read, and many embeddings compared, on workers, if
    the dataset's folder may be written to.

    Raises RecipeError (select.<name>.where) for a condition that DuckDB rejects.
    """
    assert all(_batch(one) <= _batch(other) for one, other in itertools.pairwise(units))
    check_conditions(recipe)
    rows = evaluate_conditions(recipe, storage, units, may_write=may_write, progress=progress)
    batch = _batches(units)
    step = sample(recipe.select, rows, batch)
    n = len(step)
    passed = which(n, lambda piece: (step[piece] == PASSED) | (step[piece] == TOMBSTONE))
    placed = which(n, lambda piece: step[piece] == TOMBSTONE)
    meet = None if earlier is None else earlier.meet
    repeats = _repeats(recipe, storage, units, rows, batch, passed, meet, may_write, progress)
    settled = not (repeats.kept[placed] >= 0).any()
    repeats.kept[placed], repeats.kind[placed] = -1, NONE
    kept = joined((own[repeats.kept[own] < 0] for own in (passed[piece] for piece in pieces(len(passed)))), np.int64)
    shard = _allot(units, kept, recipe.shards.samples)
    shard[placed], step[placed] = -1, BLOCKED
    key = rows.key
    if earlier is not None:
        for piece in pieces(n):
            shard[piece] += np.where(shard[piece] >= 0, earlier.shards, 0)
        key = joined([key, earlier.keys], key.dtype)
    release(batch, step, shard, passed, kept)
    names = [condition.name for condition in recipe.select]
    funnel = _funnel(recipe, step, names, repeats)
    return Decisions(units, key, rows.sha256, shard, step, repeats, names, funnel, settled)


def _repeats(
    recipe: Recipe,
    storage: Storage,
    units: list[Staged],
    rows: QueryResult,
    batch: npt.NDArray[np.int64],
    passed: npt.NDArray[np.int64],
    meet: Meet | None,
    may_write: bool,
    progress: bool,
) -> Repeats:
    """Find the rows that repeat another, comparing only those that `passed`."""
    dedup = recipe.dedup
    with scratch() as folder:

        def vectors(scorer: str) -> Embeddings:
            files = VectorFiles(storage, units, scorer, recipe.resources, progress)
            check_vectors(units, scorer)
            return files if may_write and files.many else embeddings(storage, units, folder, scorer=scorer)

        seen = None if dedup.semantic is None else vectors(EMBEDDINGS)
        described = None if dedup.copies is None else vectors(DESCRIPTORS)
        colours = None if rows.colours is None else taken(rows.colours, passed)
        measures = (taken(rows.sha256, passed), taken(rows.phash, passed), colours, taken(rows.area, passed))
        different = apart(storage, taken(rows.key, passed))
        found = find_repeats(recipe, storage, *measures, taken(batch, passed), seen, passed, described, different, meet)
    kept, kind = filled(len(batch), -1, np.int64), filled(len(batch), NONE, np.int8)
    for piece in pieces(len(passed)):
        other, how = found.kept[piece], found.kind[piece]
        contaminated = how == CONTAMINATED
        kept[passed[piece]] = np.where(contaminated, other, renumbered(other, passed, len(batch)))
        kind[passed[piece]] = how
    release(kept, kind, passed)
    return Repeats(kept, kind, found.evaluation)


def _batch(unit: Staged) -> int:
    return int(unit.unit.partition("-")[0])


def _batches(units: Sequence[Staged]) -> npt.NDArray[np.int64]:
    """Return the batch of each row."""
    batch, start = empty(sum(unit.rows for unit in units), np.int64), 0
    for unit in units:
        batch[start : start + unit.rows] = _batch(unit)
        start += unit.rows
    return release(batch)


def _allot(units: Sequence[Staged], kept: npt.NDArray[np.int64], samples: int) -> npt.NDArray[np.int64]:
    """Assign a shard to each of the rows `kept`, -1 to the others.

    Each batch gets as few shards as hold its rows, with sizes that differ by at most one. A shard holds rows of one
    batch only, so that a new batch moves no row.
    """
    shard, ends = filled(sum(unit.rows for unit in units), -1, np.int64), dict[int, int]()
    for unit, end in zip(units, itertools.accumulate(unit.rows for unit in units), strict=True):
        ends[_batch(unit)] = end
    first = start = 0
    for end in ends.values():
        stop = start + int(np.searchsorted(kept[start:], end))
        count = -(-(stop - start) // samples)
        for part in np.array_split(kept[start:stop], count) if count else []:
            shard[part] = first
            first += 1
        start = stop
    return release(shard, kept)


def shard_rows(shard: npt.NDArray[np.int64]) -> dict[int, tuple[int, int]]:
    """Return shard → (first, last) of its rows, for the shards in `shard` [n]."""
    found = dict[int, tuple[int, int]]()
    for piece in pieces(len(shard)):
        own = shard[piece]
        here = np.flatnonzero(own >= 0)
        numbers, places = np.unique(own[here], return_index=True)
        last = len(here) - 1 - np.unique(own[here][::-1], return_index=True)[1]
        bounds = [(piece.start + here[side]).tolist() for side in (places, last)]
        for number, start, stop in zip(numbers.tolist(), *bounds, strict=True):
            found[number] = (found.get(number, (start, stop))[0], stop)
    release(shard)
    return dict(sorted(found.items()))


def _funnel(recipe: Recipe, step: npt.NDArray[np.int16], names: list[str], repeats: Repeats) -> list[dict[str, Any]]:
    """Count the rows left after each step, and the rows that it removed."""
    steps, kinds = tally(step), tally(repeats.kind)
    losses = [("fetched and decoded", steps[_FAILED])]
    if removed := steps[BLOCKED]:
        losses.append((REMOVED, removed))
    losses += [(name, steps[number]) for number, name in enumerate(names, 1)]
    losses += [(_SHOWN[kind], kinds[kind]) for kind in _duplicates(recipe)]
    return _left(len(step), losses)


def _left(rows: int, losses: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Return the funnel: each step, the rows that it removed, and those left after it."""
    funnel, left = [{"step": "rows", "left": rows, "lost": 0}], rows
    for name, lost in losses:
        left -= lost
        funnel.append({"step": name, "left": left, "lost": lost})
    return funnel


def funnel_with(
    recipe: Recipe, funnel: Sequence[Mapping[str, Any]], added: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a dataset's funnel once the rows of new batches are there, whose own funnel is `added`."""
    losses = [sum(both) for both in zip(*(_losses(recipe, one) for one in (funnel, added)), strict=True)]
    return _named(recipe, int(funnel[0]["left"]) + int(added[0]["left"]), losses)


def _losses(recipe: Recipe, funnel: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return how many rows each step removed, as numbers in the order of `_named`."""
    losses = [int(step["lost"]) for step in funnel[1:]]
    if len(losses) == 1 + len(recipe.select) + len(_duplicates(recipe)):
        losses.insert(1, 0)
    return losses


def _named(recipe: Recipe, rows: int, losses: Sequence[int]) -> list[dict[str, Any]]:
    """Return the funnel by how many rows each step removed: failures, takedowns, conditions, duplicates."""
    conditions = [condition.name for condition in recipe.select]
    names = ["fetched and decoded", REMOVED, *conditions, *(_SHOWN[kind] for kind in _duplicates(recipe))]
    return _left(rows, [step for step in zip(names, losses, strict=True) if step != (REMOVED, 0)])


def funnel_without(recipe: Recipe, funnel: Sequence[Mapping[str, Any]], removed: pa.Table) -> list[dict[str, Any]]:
    """Return a dataset's funnel after a takedown of rows; `removed` holds their outcome and reason before."""
    kinds = _duplicates(recipe)
    conditions = [condition.name for condition in recipe.select]
    losses = _losses(recipe, funnel)
    first_kind = 2 + len(conditions)
    for outcome, reason in zip(removed["outcome"].to_pylist(), removed["reason"].to_pylist(), strict=True):
        losses[1] += 1
        if outcome == FAILED:
            losses[0] -= 1
        elif outcome == REJECTED:
            losses[1 if reason == REMOVED else 2 + conditions.index(reason)] -= 1
        elif outcome == DUPLICATE:
            losses[first_kind + kinds.index(REASONS.index(reason))] -= 1
    return _named(recipe, int(funnel[0]["left"]), losses)


_SHOWN: Final = {
    CONTAMINATED: "in the evaluation set",
    EXACT: "exact duplicates",
    PERCEPTUAL: "near duplicates",
    COPIES: "edited copies",
    SEMANTIC: "semantic duplicates",
}


def _duplicates(recipe: Recipe) -> list[int]:
    """Return the kinds of repeats that the funnel shows for a recipe."""
    dedup = recipe.dedup
    hidden = {CONTAMINATED: dedup.decontaminate, COPIES: dedup.copies, SEMANTIC: dedup.semantic}
    return [kind for kind in _SHOWN if kind not in hidden or hidden[kind] is not None]
