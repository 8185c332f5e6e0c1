"""New batches of rows → their shards and ledger tables, added to a dataset that is as its recipe selects it

Rows of earlier batches come first in every comparison, and a shard holds rows of one batch. So new rows change nothing
of what is there, if conditions alone decide, and duplicates by files and hashes: only new rows are decided, and packed.
With at_most, balance, top, duplicates by embeddings, or verdicts on pairs, all rows are selected again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.dataset.damage import note_error
from capstan.pipeline.dataset.shards import Manifest
from capstan.pipeline.errors import CapstanError, DamagedFile, RecipeError, StorageError
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.pack.job import pack, pack_part, selection_of
from capstan.pipeline.pack.without import decides_rows_alone
from capstan.pipeline.score.scorer import Scorer
from capstan.pipeline.score.store import pins
from capstan.pipeline.select import kept_runs
from capstan.pipeline.select.arrays.saved import SCRATCH
from capstan.pipeline.select.decide import Decisions, decide, funnel_with, shard_name
from capstan.pipeline.select.kept_runs import is_settled
from capstan.pipeline.select.meeting import MEETING, KeptRows
from capstan.pipeline.select.pairs import pairs_signature
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Summary

log = logging.getLogger(__name__)


def decide_and_pack(
    recipe: Recipe,
    storage: Storage,
    units: list[Staged],
    before: Manifest | None,
    scorers: Sequence[Scorer],
    decided: Callable[[], None],
    *,
    progress: bool = True,
) -> tuple[Manifest, Summary]:
    """Select the units' rows and publish the dataset, of which `before` is the manifest so far.

    `decided` is called between the two.
    """
    _sweep(storage)
    there = {entry.name for entry in before.ledger} if before else set()
    grown = any(f"unit-{unit.unit}" not in there for unit in units)
    new = added_units(recipe, storage, units, before, scorers) if grown else []
    alone = _decide_added(recipe, storage, new, before, units, progress) if new and before is not None else None
    if alone is not None and before is not None:
        decisions = alone
        decided()
        manifest, summary = pack_added(recipe, storage, decisions, units, before, scorers, progress=progress)
    else:
        decisions = decide(recipe, storage, units, may_write=True, progress=progress)
        decided()
        manifest, summary = pack(recipe, storage, decisions, scorers, progress=progress)
    if grown and manifest.complete and decides_rows_alone(recipe):
        kept_runs.cover(recipe, storage, manifest, units, settled=decisions.settled, progress=progress)
    return manifest, summary


def _sweep(storage: Storage) -> None:
    """Remove what a selection that was killed has left."""
    met = [name for name in storage.names(kept_runs.FOLDER) if name.startswith(MEETING)]
    storage.delete(*met, *storage.names(SCRATCH))


def _decide_added(
    recipe: Recipe, storage: Storage, new: list[Staged], before: Manifest, units: list[Staged], progress: bool
) -> Decisions | None:
    """Return the decisions on new rows; None if earlier ones cannot be read: their ledger tables are written again."""
    try:
        kept = KeptRows(recipe, storage, before, units, progress=progress)
        return decide(recipe, storage, new, earlier=kept, may_write=True, progress=progress)
    except (RecipeError, StorageError):
        raise
    except CapstanError as error:
        log.warning("%s: all rows are selected again", error)
        if isinstance(error, DamagedFile):
            note_error(storage, error)  # so that packing replaces it
        return None


def added_units(
    recipe: Recipe, storage: Storage, units: Sequence[Staged], before: Manifest | None, scorers: Sequence[Scorer]
) -> list[Staged]:
    """Return the units of new batches, if all others are in the dataset as the recipe selects them; else []."""
    if before is None or not before.complete or fingerprint(before.scores) != fingerprint(pins(scorers)):
        return []
    there = {entry.name for entry in before.ledger}
    old = [unit for unit in units if f"unit-{unit.unit}" in there]
    new = [unit for unit in units if f"unit-{unit.unit}" not in there]
    if not old or not new or len(old) < len(there) or _batch(old[-1]) >= _batch(new[0]):
        return []
    if sum(unit.rows for unit in new) > sum(unit.rows for unit in old):
        return []  # comparing all rows with each other takes about as long, and fewer files
    if [entry.name for entry in before.shards] != [shard_name(number) for number in range(len(before.shards))]:
        return []
    alone = decides_rows_alone(recipe) and not pairs_signature(storage) and is_settled(storage, before)
    return new if alone and before.selection == selection_of(recipe, storage, old) else []


def _batch(unit: Staged) -> int:
    return int(unit.unit.partition("-")[0])


def pack_added(
    recipe: Recipe,
    storage: Storage,
    decisions: Decisions,
    staged: Sequence[Staged],
    before: Manifest,
    scorers: Sequence[Scorer],
    *,
    progress: bool = True,
) -> tuple[Manifest, Summary]:
    """Publish the dataset with new rows. `before` is its manifest without them, `staged` are all units."""
    counts = decisions.counts
    result = Manifest(
        counts={name: before.counts.get(name, 0) + rows for name, rows in counts.items()},
        funnel=funnel_with(recipe, before.funnel, decisions.funnel),
        shards=before.shards,
        ledger=before.ledger,
    )
    return pack_part(recipe, storage, decisions, staged, result, scorers, progress=progress)
