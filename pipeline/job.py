"""The recipe → a finished dataset: plan → ingest → select → pack, each stage going on where it stopped."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.again import Round, begin, end, parse_reasons
from pipeline.config import Blocklist, Recipe, WorldSource, fingerprint
from pipeline.errors import RecipeError
from pipeline.ingest import Ingest, Staged, clean, failed_table, staged
from pipeline.pack import content_recipe, pack, selection_of
from pipeline.plan import Plan, plan, read_plan
from pipeline.remove import finish, recipe_of, resume, take_down
from pipeline.select import check_conditions, decide
from pipeline.shards import Manifest, read_manifest, sha256_of
from pipeline.storage import Storage, parquet_bytes
from pipeline.units import markers, pending, quarantined, run

log = logging.getLogger(__name__)


def build(recipe: Recipe, *, retry: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Build the dataset of `recipe`, or complete it. Gives a summary: what the dataset holds now, and what it took.

    `retry` names reasons ("timeout,http_503", or "failed" for all): rows that failed for these are tried again.

    Units that kept failing are in the summary's `quarantined` (unit → reason): the rows of an ingest unit are then
    `failed` in the ledger until a later build reads them. Raises RecipeError for what the user can mend.
    """
    clock = _Clock()
    reasons = [] if retry is None else parse_reasons(retry)
    storage = Storage(recipe.dataset, recipe.storage)
    storage.check_writable()
    check_conditions(recipe.select)
    resume(storage)
    planned = plan(recipe, storage, progress=progress)
    clock.lap("plan")
    job = Ingest(recipe, storage)
    units = job.units(planned.units)
    again = begin(job, units, markers(job), reasons) if reasons else Round({}, 0)
    with _site(job, needed=bool(again.units or pending(job, units))) as resolve:
        job = Ingest(recipe, storage, resolve)
        summary = run(job, again.of(units), recipe.resources, redo=again.units.keys(), progress=progress)
    retried = end(job)
    ready = _staged(job, planned, summary.quarantined)
    if retried or summary.done or not _is_current(read_manifest(storage), recipe, storage, ready):
        clean(job, ready)
    clock.lap("ingest")
    failed = {name.removeprefix("failed."): int(n) for name, n in summary.counts.items() if name.startswith("failed.")}
    published = _publish(recipe, storage, ready, clock, progress)
    return {
        **published,
        **({"retried": again.rows} if reasons else {}),
        "failed": dict(sorted(failed.items(), key=lambda item: (-item[1], item[0]))),
        "source": {"rows": planned.read, "repeats": planned.repeats},
        "seconds": clock.laps,
        "quarantined": {**summary.quarantined, **published["quarantined"]},
    }


def select(recipe: Recipe, *, dry_run: bool = False, progress: bool = True) -> dict[str, Any]:
    """Decide again about what is staged already, by the recipe's conditions as they are now. `dry_run` only counts.

    Raises RecipeError where nothing is staged, or for a condition that DuckDB does not take.
    """
    clock = _Clock()
    storage = Storage(recipe.dataset, recipe.storage)
    check_conditions(recipe.select)
    if not dry_run:
        resume(storage)
    job = Ingest(recipe, storage)
    units = _staged(job, read_plan(storage), quarantined(job))
    if not units:
        raise RecipeError("dataset", f"nothing is staged at {recipe.dataset}", "run `capstan build` first")
    if dry_run:
        decisions = decide(recipe, storage, units)
        clock.lap("select")
        seen = {"dataset": recipe.dataset, "counts": decisions.counts, "funnel": decisions.funnel}
        return {**seen, "seconds": clock.laps}
    return {**_publish(recipe, storage, units, clock, progress), "seconds": clock.laps}


def remove(
    dataset: str, lists: Blocklist, options: Mapping[str, Any] | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Take down what `lists` (files of entries) name: from what is staged, and from the shards that hold it. What was
    killed is completed by any later `remove`, `select` or `build`."""
    storage = Storage(dataset, options, field="DATASET")
    takedown = take_down(storage, lists)
    recipe = recipe_of(storage)
    counts = {"rows": len(takedown.rows), "kept": len(takedown.kept), "shards": len(takedown.shards)}
    summary: dict[str, Any] = {"dataset": dataset, "removed": counts}
    if recipe is None:
        finish(storage)
        return summary
    published = select(recipe, progress=progress)
    return {**summary, "counts": published["counts"], "quarantined": published["quarantined"]}


def _publish(recipe: Recipe, storage: Storage, units: list[Staged], clock: _Clock, progress: bool) -> dict[str, Any]:
    """Select and pack, unless the dataset is just that already."""
    manifest, bad_shards = read_manifest(storage), dict[str, str]()
    if manifest is None or not _is_current(manifest, recipe, storage, units):
        decisions = decide(recipe, storage, units)
        clock.lap("select")
        manifest, summary = pack(recipe, storage, decisions, progress=progress)
        bad_shards = summary.quarantined
        clock.lap("pack")
    if manifest.complete:
        finish(storage)
    return {
        "dataset": recipe.dataset,
        "counts": manifest.counts,
        "funnel": manifest.funnel,
        "quarantined": bad_shards,
    }


def _is_current(manifest: Manifest | None, recipe: Recipe, storage: Storage, units: list[Staged]) -> bool:
    if manifest is None:
        return False
    same_recipe = manifest.recipe_hash == fingerprint(content_recipe(recipe))
    return manifest.complete and same_recipe and manifest.selection == selection_of(recipe, storage, units)


def _staged(job: Ingest, planned: Plan, bad: Mapping[str, str]) -> list[Staged]:
    """What is staged of the planned units, in order. A quarantined unit (`bad`: with its reason) gets a table in which
    every row failed."""
    done = staged(markers(job))
    units = []
    for unit in planned.units:
        if unit.id in done:
            units.append(done[unit.id])
        elif unit.id in bad:
            rows = job.storage.read_table(unit.table, ["key", "url", "caption", "extra"])
            detail = f"its unit was quarantined: {bad[unit.id]}"
            data = parquet_bytes(failed_table(rows, unit.id, "read_error", detail))
            name = f"staged/{unit.id}-{sha256_of(data)[:16]}.parquet"
            if not job.storage.exists(name):
                job.storage.write(name, data)
            units.append(Staged(unit.id, name, "", len(rows)))
    return units


@contextlib.contextmanager
def _site(job: Ingest, *, needed: bool) -> Iterator[dict[str, str]]:
    """The captioned world's web site, if the source is one and some of it is still to fetch: host → address."""
    source = job.recipe.source
    if source is None or source.format != "world" or not needed:
        yield {}
        return
    from pipeline.world.rows import HOST
    from pipeline.world.site import Site

    with Site(source.world or WorldSource()) as site:
        yield {HOST: site.address}


class _Clock:
    """Seconds by stage, for the summary only: nothing timed is written into a dataset."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.laps[stage] = round(now - self._last, 3)
        self._last = now
