"""Recipe → finished dataset: plan → ingest → score → select → pack

Each stage resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from capstan.pipeline.config import Blocklist, Recipe, WorldSource
from capstan.pipeline.dataset.damage import forget_damage, note_damage, noted_damage
from capstan.pipeline.dataset.shards import CLIPS, Manifest, read_manifest
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.ingest.job import Ingest, Staged, clean
from capstan.pipeline.ingest.retry_rows import FREED, RetryRound, begin_retry, end_retry, parse_reasons
from capstan.pipeline.ingest.staging import free, may_be_freed, staged_units
from capstan.pipeline.lease import HeldLease, lease
from capstan.pipeline.pack.added import decide_and_pack
from capstan.pipeline.pack.carryover import lost_rows, packed_shards
from capstan.pipeline.pack.job import is_current
from capstan.pipeline.pack.named_rows import row_tables
from capstan.pipeline.pack.repair import broken_units, drop_broken
from capstan.pipeline.pack.row_lookup import cover
from capstan.pipeline.pack.takedown import Takedown, finish, pending, recipe_of, resume, take_down
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.pack.verify_derived import forget_derived
from capstan.pipeline.pack.without import decides_rows_alone, pack_without
from capstan.pipeline.records import KEPT
from capstan.pipeline.run_history import Clock, note_run
from capstan.pipeline.score import registry
from capstan.pipeline.score.job import as_scored
from capstan.pipeline.score.job import score as run_scorers
from capstan.pipeline.score.scorer import Scorer
from capstan.pipeline.select import column_blocks
from capstan.pipeline.select.conditions import check_conditions
from capstan.pipeline.select.decide import decide
from capstan.pipeline.select.review import check_reviews
from capstan.pipeline.source.plan import Plan, plan, read_plan
from capstan.pipeline.source.planning.batches import restore_keys
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import run

log = logging.getLogger(__name__)


def build(recipe: Recipe, *, retry: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Build or complete the dataset of `recipe` and return a summary: what the dataset holds now, and how long it took.

    `retry` names failure reasons ("timeout,http_503", or "failed" for all): rows that failed for these are tried
    again. "freed" selects rows whose images `keep_staged: false` removed and that the recipe keeps now.

    Units that kept failing are listed in the summary's `quarantined` (unit → reason). The rows of such an ingest unit
    are `failed` in the ledger until a later build reads them. Raises RecipeError for anything the user can fix, and
    CapstanError if another process is writing this dataset.
    """
    reasons = [] if retry is None else parse_reasons(retry)
    storage = Storage(recipe.dataset, recipe.storage)
    if recipe.source is not None and recipe.source.world is not None and recipe.source.world.moving is not None:
        hint = "make its clips with `capstan cut`, and name their tars in source.path"
        raise RecipeError("source.world.moving", "this world has clips, no images", hint)
    storage.check_writable()
    if storage.exists(CLIPS):
        problem = f"{recipe.dataset} holds the clips that `capstan cut` made"
        raise RecipeError("dataset", problem, "choose another folder, and name this one's shards/*.tar in source.path")
    if read_manifest(storage) is None:  # later builds may have nothing left to score
        registry.check_machine(recipe)
    with lease(storage, "build") as held:
        return _build(recipe, storage, held, reasons, progress)


def repair(dataset: str, options: Mapping[str, Any] | None = None, *, progress: bool = True) -> dict[str, Any]:
    """Verify a dataset and rebuild what is missing or damaged, as far as something still holds it.

    Images are taken from staged files and shards, the rest from the source. In the summary, `repaired` and `problems`
    are verify's lines that are gone and left; `forgotten` names damaged captions and latents that were removed, and the
    command that makes them again; `lost` is the number of kept rows whose image is nowhere: they failed.
    """
    storage = Storage(dataset, options, field="DATASET")
    storage.check_writable()
    before = verify(storage, progress=progress)
    if not before:
        return {"dataset": dataset, "ok": True, "repaired": [], "problems": [], "forgotten": [], "lost": 0}
    with lease(storage, "verify --repair") as held:
        try:
            manifest, recipe = read_manifest(storage), recipe_of(storage)
        except CapstanError as error:
            problems = [*before, f"not repaired: {error}"]
            return {"dataset": dataset, "ok": False, "repaired": [], "problems": problems, "forgotten": [], "lost": 0}
        assert manifest is not None
        assert recipe is not None
        forgotten = forget_derived(storage, {line.partition(": ")[0] for line in before})
        for line in before:
            name, _, problem = line.partition(": ")
            note_damage(storage, name, problem)
        planned = read_plan(storage)
        restore_keys(storage, planned.units)
        summary = _build(recipe, storage, held, [], progress, planned=planned)
        left = verify(storage, progress=progress)
        forget_damage(storage, {line.partition(": ")[0] for line in before if line not in left})
    again = {line.partition(": ")[0] for line in forgotten}
    return {
        "dataset": dataset,
        "ok": not left,
        "repaired": [line for line in before if line not in left and line.partition(": ")[0] not in again],
        "problems": left,
        "forgotten": forgotten,
        "lost": max(0, sum(entry.samples for entry in manifest.shards) - summary["counts"].get(KEPT, 0)),
        "counts": summary["counts"],
        "quarantined": summary["quarantined"],
    }


def _build(
    recipe: Recipe,
    storage: Storage,
    held: HeldLease,
    reasons: list[str],
    progress: bool,
    *,
    planned: Plan | None = None,
) -> dict[str, Any]:
    clock = Clock()
    check_conditions(recipe)
    check_reviews(recipe, storage)
    scorers = registry.scorers(recipe)
    resume(storage, progress=progress)
    planned = planned or plan(recipe, storage, progress=progress)
    clock.lap("plan")
    job = Ingest(recipe, storage)
    units = job.units(planned.units)
    damaged = noted_damage(storage)
    broken, freeing = _rebuild_staged(job, planned, damaged, progress)
    if freeing:
        reasons = [*reasons, FREED]
    freed = _freed(recipe, job, planned, scorers) if FREED in reasons else {}
    again = begin_retry(job, units, job.markers.read(), reasons, freed) if reasons else RetryRound({}, 0)
    fresh = job.markers.pending(units)
    with _site(job, needed=bool(again.units or fresh)) as resolve:
        job = Ingest(recipe, storage, resolve)
        summary = run(job, again.of(units), recipe.resources, redo=again.units.keys(), progress=progress)
    retried = end_retry(job)
    ready = staged_units(job, planned, summary.quarantined)
    held.check()
    if retried or broken or summary.done or not is_current(read_manifest(storage), recipe, storage, ready):
        clean(job, ready)
    clock.lap("ingest")
    failed = {name.removeprefix("failed."): int(n) for name, n in summary.counts.items() if name.startswith("failed.")}
    published = _publish(recipe, storage, held, ready, scorers, clock, progress)
    if published["quarantined"] and noted_damage(storage) - damaged:  # packing met damage that nothing had read before
        return _build(recipe, storage, held, [], progress, planned=planned)
    bad = {**summary.quarantined, **published["quarantined"]}
    if retried or broken or summary.done:
        cover(storage, row_tables(storage, planned), recipe.resources, progress=progress)
    if not bad:
        forget_damage(storage, damaged)
        _refuse_hopeless(recipe, failed, planned.rows)
    if summary.done or "pack" in clock.laps:
        ingested = again.rows + sum(unit.spec["rows"] for unit in fresh if unit.id not in summary.quarantined)
        note_run(storage, "build", ingested, clock.laps)
    return {
        **published,
        **({"retried": again.rows} if reasons else {}),
        "failed": dict(sorted(failed.items(), key=lambda item: (-item[1], item[0]))),
        "source": {
            "rows": planned.read,
            "repeats": planned.repeats,
            **({} if planned.captions is None else {"captions": planned.captions, "unused": planned.unused}),
        },
        "seconds": clock.laps,
        "quarantined": bad,
    }


def _rebuild_staged(job: Ingest, planned: Plan, damaged: set[str], progress: bool) -> tuple[bool, bool]:
    """Drop broken shards from the manifest, and stage the units again whose staged files are missing or `damaged`.

    Return whether there were such units, and whether images of dropped shards may have to be fetched again.
    """
    storage = job.storage
    before = read_manifest(storage)
    manifest = drop_broken(storage, before, damaged)
    broken, lost = broken_units(job, planned, manifest, damaged)
    job.markers.forget(lost)
    if broken:
        with _site(job, needed=True) as resolve:
            again = Ingest(job.recipe, storage, resolve)
            rebuilt = run(again, broken.values(), job.recipe.resources, redo=broken.keys(), progress=progress)
        if not rebuilt.quarantined:
            forget_damage(storage, (name for name in damaged if name.startswith("staged/")))
    return bool(broken), manifest is not before and may_be_freed(storage)


def _refuse_hopeless(recipe: Recipe, failed: Mapping[str, int], rows: int) -> None:
    """Raise CapstanError if all rows failed for one reason that the recipe is likely to cause."""
    reason = next(iter(failed), "")
    embedded = recipe.source is not None and recipe.source.image is not None
    fixes = {
        "bad_url": "check that source.url names the column with http or https URLs",
        "bad_caption": "check that source.caption names a column of text",
        "private_address": "set fetch.allow_private: true if these hosts are yours",
    }
    if embedded:
        column = "check that source.image names the column with the images' bytes"
        fixes |= dict.fromkeys(("empty", "not_an_image"), column)
    if rows and failed.get(reason) == rows and reason in fixes:
        raise CapstanError(f"all {rows:,} rows failed as {reason}; nothing is kept. Fix: {fixes[reason]}")


def score(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Run the recipe's scorers on staged rows that lack their scores, and publish the columns.

    Nothing is fetched. Tars are rewritten only if the selection now keeps other rows.
    """
    clock = Clock()
    storage = Storage(recipe.dataset, recipe.storage)
    check_conditions(recipe)
    check_reviews(recipe, storage)
    scorers = registry.scorers(recipe)
    storage.check_writable()
    if not scorers:
        raise RecipeError("score", "names no scorer", "add one, e.g. score: {caption: {}, image: {}}")
    with lease(storage, "score") as held:
        resume(storage, progress=progress)
        units = _found(recipe, storage)
        return {**_publish(recipe, storage, held, units, scorers, clock, progress), "seconds": clock.laps}


def select(recipe: Recipe, *, dry_run: bool = False, progress: bool = True) -> dict[str, Any]:
    """Apply the recipe's current conditions to the rows that are staged already. `dry_run` only counts.

    Raises RecipeError if nothing is staged or scored, or if DuckDB rejects a condition.
    """
    storage = Storage(recipe.dataset, recipe.storage)
    check_conditions(recipe)
    storage.check_reachable()
    check_reviews(recipe, storage)
    if not dry_run:
        storage.check_writable()
        with lease(storage, "select") as held:
            return _select(recipe, storage, held, progress)
    clock = Clock()
    units = as_scored(recipe, storage, registry.scorers(recipe), _found(recipe, storage))
    decisions = decide(recipe, storage, units)
    clock.lap("select")
    return {
        "dataset": recipe.dataset,
        "counts": decisions.counts,
        "funnel": decisions.funnel,
        "seconds": clock.laps,
    }


def _select(recipe: Recipe, storage: Storage, held: HeldLease, progress: bool) -> dict[str, Any]:
    clock = Clock()
    check_conditions(recipe)
    check_reviews(recipe, storage)
    scorers = registry.scorers(recipe)
    resume(storage, progress=progress)
    units = as_scored(recipe, storage, scorers, _found(recipe, storage))
    published = _publish(recipe, storage, held, units, scorers, clock, progress)
    if "pack" in clock.laps:
        note_run(storage, "select", 0, clock.laps)
    return {**published, "seconds": clock.laps}


def remove(
    dataset: str, lists: Blocklist, options: Mapping[str, Any] | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Remove the rows that `lists` (files of entries) name from the staged files and from the shards.

    An interrupted removal is completed by the next `remove`, `select`, `score` or `build`.
    """
    storage = Storage(dataset, options, field="DATASET")
    storage.check_writable()
    with lease(storage, "remove") as held:
        before = _current(storage)
        takedown = take_down(storage, lists, progress=progress)
        recipe = recipe_of(storage)
        counts = {"rows": len(takedown.rows), "kept": len(takedown.kept), "shards": len(takedown.shards)}
        summary: dict[str, Any] = {"dataset": dataset, "removed": counts}
        if recipe is None:
            finish(storage)
            return summary
        if before is None:
            published = _select(recipe, Storage(recipe.dataset, recipe.storage), held, progress)
        else:
            published = _without(recipe, storage, held, before, takedown, progress)
    return {**summary, "counts": published["counts"], "quarantined": published["quarantined"]}


def _current(storage: Storage) -> Manifest | None:
    """Return the manifest if a takedown needs to publish again only what holds its rows.

    The dataset has to be complete and as its recipe selects it, and the recipe has to decide each row alone.
    """
    try:
        if (recipe := recipe_of(storage)) is None or not decides_rows_alone(recipe) or pending(storage):
            return None
        manifest, units = (
            read_manifest(storage),
            as_scored(recipe, storage, registry.scorers(recipe), _found(recipe, storage)),
        )
        return manifest if is_current(manifest, recipe, storage, units) else None
    except CapstanError:  # it is raised again once the rows are scrubbed
        return None


def _without(
    recipe: Recipe, storage: Storage, held: HeldLease, before: Manifest, takedown: Takedown, progress: bool
) -> dict[str, Any]:
    """Publish the dataset `before` without the rows of a takedown, which are scrubbed."""
    clock, scorers = Clock(), registry.scorers(recipe)
    units = as_scored(recipe, storage, scorers, _found(recipe, storage))
    held.check()
    planned = read_plan(storage)
    manifest, summary = pack_without(recipe, storage, planned, units, before, takedown, scorers, progress=progress)
    clock.lap("pack")
    if manifest.complete:
        finish(storage)
    note_run(storage, "select", 0, clock.laps)
    return {"counts": manifest.counts, "quarantined": summary.quarantined}


def _publish(
    recipe: Recipe,
    storage: Storage,
    held: HeldLease,
    units: list[Staged],
    scorers: list[Scorer],
    clock: Clock,
    progress: bool,
) -> dict[str, Any]:
    """Score, select and pack, unless the dataset is up to date."""
    manifest, bad = read_manifest(storage), dict[str, str]()
    if scorers:
        packed = functools.cache(lambda unit: packed_shards(storage, manifest, unit))
        units, scored = run_scorers(recipe, storage, scorers, units, packed=packed, progress=progress)
        bad |= scored.quarantined
        clock.lap("score")
    if manifest is None or not is_current(manifest, recipe, storage, units):

        def decided() -> None:
            clock.lap("select")
            held.check()

        manifest, summary = decide_and_pack(recipe, storage, units, manifest, scorers, decided, progress=progress)
        bad |= summary.quarantined
        column_blocks.cover(recipe, storage, units, progress=progress)
        clock.lap("pack")
    elif not recipe.keep_staged:
        free(storage, units)
    if manifest.complete:
        finish(storage)
    return {
        "dataset": recipe.dataset,
        "counts": manifest.counts,
        **({"licenses": manifest.licenses} if manifest.licenses else {}),
        "funnel": manifest.funnel,
        "quarantined": bad,
    }


def _found(recipe: Recipe, storage: Storage) -> list[Staged]:
    """Return the staged units without reading the source."""
    job = Ingest(recipe, storage)
    if units := staged_units(job, read_plan(storage), job.markers.quarantined()):
        return units
    raise RecipeError("dataset", f"nothing is staged at {recipe.dataset}", "run `capstan build` first")


def _freed(recipe: Recipe, job: Ingest, planned: Plan, scorers: list[Scorer]) -> dict[str, list[str]]:
    """Return unit → keys of the rows that the recipe keeps now but whose images are neither staged nor packed."""
    units = as_scored(recipe, job.storage, scorers, staged_units(job, planned, job.markers.quarantined()))
    decisions = decide(recipe, job.storage, units)
    rows = lost_rows(job.storage, read_manifest(job.storage), decisions)
    found: dict[str, list[str]] = {}
    for unit, start, stop in zip(units, decisions.starts, decisions.starts[1:], strict=False):
        if len(own := rows[(rows >= start) & (rows < stop)]):
            found[unit.unit] = decisions.keys(own)
    return found


@contextlib.contextmanager
def _site(job: Ingest, *, needed: bool) -> Iterator[dict[str, str]]:
    """Serve the captioned world's web site while some of it is still to be fetched; yield host → IP address."""
    source = job.recipe.source
    if source is None or source.format != "world" or not needed:
        yield {}
        return
    from capstan.pipeline.world.server import Site
    from capstan.pipeline.world.table import HOST

    with Site(source.world or WorldSource()) as site:
        yield {HOST: site.address}
