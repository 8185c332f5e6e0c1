"""`capstan cut`: recipe → clips, their ledger, and the manifest clips.json last

clips.json    {format_version, recipe, recipe_hash, complete, counts, shards, ledger}; what it does not list does not
              exist for readers
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any, Final

from capstan.pipeline import extras
from capstan.pipeline.config import Recipe, Unit, WorldSource, fingerprint
from capstan.pipeline.dataset.shards import CLIPS, MANIFEST, sha256_of
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.ingest.retry_rows import matches, parse_reasons
from capstan.pipeline.lease import lease
from capstan.pipeline.run_history import note_run
from capstan.pipeline.source import SourceReader
from capstan.pipeline.source.plan import Plan, plan
from capstan.pipeline.source.samples import SOUNDS, VIDEOS
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Summary, run

log = logging.getLogger(__name__)

FORMAT: Final = 1
_SECTIONS: Final = {"source", "fetch", "cut", "blocklist"}


def cut(recipe: Recipe, *, retry: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Cut the videos of `recipe` into clips, or complete that; return a summary.

    `retry` names failure reasons ("timeout,http_503", or "failed" for all): the units with videos that failed for these
    are done again. Units that kept failing are in the summary's `quarantined` (unit → reason).

    Raises RecipeError for anything the user can fix, and CapstanError if another process is writing this folder.
    """
    extras.require(extras.VIDEO, "cut")
    from capstan.pipeline.clips.job import CutVideos

    reasons = [] if retry is None else parse_reasons(retry)
    world = moving_world(recipe)
    storage = Storage(recipe.dataset, recipe.storage)
    storage.check_writable()
    if storage.exists(MANIFEST):
        problem = f"{recipe.dataset} holds a dataset that `capstan build` made"
        raise RecipeError("dataset", problem, "choose another folder for the clips")
    with lease(storage, "cut"):
        suffixes = VIDEOS | SOUNDS if recipe.cut.sound == "only" else VIDEOS
        by_video = recipe.model_copy(update={"unit": Unit(rows=recipe.cut.videos)})
        planned = plan(by_video, storage, progress=progress, rows=SourceReader(by_video, suffixes))
        job = CutVideos(recipe, storage)
        units, marks = job.units(planned.units), job.markers.read()
        again = {
            unit
            for unit, mark in marks.items()
            if any(matches(name.removeprefix("failed."), reasons) for name in mark if name.startswith("failed."))
        }
        if storage.exists(CLIPS) and (again or job.markers.pending(units)):
            _publish(recipe, storage, planned, {u: m for u, m in marks.items() if u not in again}, complete=False)
        with _site(world, needed=bool(again or job.markers.pending(units))) as resolve:
            job.resolve |= resolve
            summary = run(job, units, recipe.resources, redo=again, progress=progress)
        return _finish(recipe, storage, planned, job, summary)


def moving_world(recipe: Recipe) -> WorldSource | None:
    """Return the captioned world whose clips are cut; None for any other source. Raises RecipeError if it stands."""
    if recipe.source is None or recipe.source.format != "world":
        return None
    world = recipe.source.world
    if world is None or world.moving is None:
        hint = "set source.world.moving: {}, or name files of videos"
        raise RecipeError("source.format", "the captioned world has images, no videos", hint)
    return world


@contextlib.contextmanager
def _site(world: WorldSource | None, *, needed: bool) -> Iterator[dict[str, str]]:
    """Serve the captioned world's clips while some are still to be fetched; yield host → address."""
    if world is None or not needed:
        yield {}
        return
    from capstan.pipeline.world.moving.server import MovingSite
    from capstan.pipeline.world.table import HOST

    with MovingSite(world) as site:
        yield {HOST: site.address}


def _finish(recipe: Recipe, storage: Storage, planned: Plan, job: Any, summary: Summary) -> dict[str, Any]:
    """Publish the manifest, remove what it does not list, and return the command's summary."""
    from capstan.pipeline.clips.job import failed_ledger, ledger_of

    marks = job.markers.read()
    for unit in planned.units:
        if unit.id not in marks:
            storage.write(ledger_of(unit.id), failed_ledger(storage, unit, summary.quarantined.get(unit.id, "")))
    manifest = _publish(recipe, storage, planned, marks, complete=not summary.quarantined)
    listed = {f"shards/{entry['name']}.tar" for entry in manifest["shards"]}
    listed |= {f"ledger/{entry['name']}.parquet" for entry in manifest["ledger"]}
    stale = [name for folder in ("shards", "ledger") for name in storage.names(folder) if name not in listed]
    storage.delete(*stale)
    others = [name for name in storage.names("state") if name.startswith("state/cut-")]
    storage.delete(*(name for name in others if not name.startswith(f"state/{job.name}/")))
    if summary.done:
        note_run(storage, "cut", sum(unit.rows for unit in planned.units), {})
    counts = manifest["counts"]
    if counts["videos"] and not counts["clips"]:
        log.warning("cut: no clip was made of %d files; the ledger has the reasons", counts["videos"])
    failed = {name.removeprefix("failed."): int(n) for name, n in summary.counts.items() if name.startswith("failed.")}
    return {
        "dataset": recipe.dataset,
        "counts": counts,
        "failed": dict(sorted(failed.items(), key=lambda item: (-item[1], item[0]))),
        "source": {"rows": planned.read, "repeats": planned.repeats},
        "quarantined": summary.quarantined,
    }


def _publish(
    recipe: Recipe, storage: Storage, planned: Plan, marks: dict[str, Any], *, complete: bool
) -> dict[str, Any]:
    """Write clips.json over the units that have a marker, and return it."""
    from capstan.pipeline.clips.job import ledger_of, shard_of

    content = recipe.model_dump(mode="json", include=_SECTIONS)
    (content["source"] or {}).pop("storage", None)
    content["image"] = {"quality": recipe.image.quality}
    shards, ledger, videos = list[dict[str, Any]](), list[dict[str, Any]](), 0
    clips, failed, seconds = 0, 0, 0.0
    for unit in planned.units:
        mark = marks.get(unit.id)
        name = ledger_of(unit.id)
        if mark is None:
            if complete or not storage.exists(name):
                continue
            mark = {"ledger": sha256_of(storage.read(name)), "failed.read_error": unit.rows}
        ledger.append(
            {"name": name.partition("/")[2].removesuffix(".parquet"), "rows": unit.rows, "sha256": mark["ledger"]}
        )
        if "shard" in mark:
            shards.append({"name": shard_of(unit.id).partition("/")[2].removesuffix(".tar"), **mark["shard"]})
        videos, clips, seconds = videos + unit.rows, clips + mark.get("clips", 0), seconds + mark.get("clip_seconds", 0)
        failed += sum(count for reason, count in mark.items() if reason.startswith("failed."))
    manifest = {
        "format_version": FORMAT,
        "recipe": content,
        "recipe_hash": fingerprint(content),
        "complete": complete,
        "counts": {"videos": videos, "failed": failed, "clips": clips, "seconds": round(seconds, 3)},
        "shards": shards,
        "ledger": ledger,
    }
    storage.write(CLIPS, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
    return manifest
