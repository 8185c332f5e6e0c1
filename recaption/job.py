"""A dataset and a recipe → a caption layer, shard by shard

    plan   which shards are incomplete, and where their images already have captions of this recipe
    run    the incomplete shards (recaption.layer_job)

An image in several new shards is captioned for the first of them. A second pass copies its captions to the others.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from capstan.pipeline import units
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import Quarantined, RecipeError
from capstan.pipeline.lease import lease
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch
from capstan.recaption import store
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import make
from capstan.recaption.layer_job import CaptionsFailed, RecaptionJob
from capstan.recaption.lint import linter
from capstan.recaption.machine import check_machine
from capstan.recaption.planning.existing import Lookup, aside_name, existing
from capstan.recaption.planning.frames import check_clips
from capstan.recaption.planning.incomplete import (
    Incomplete,
    New,
    counts_of,
    files_of_others,
    incomplete,
    lacking_of,
    slots_in,
    take_sample,
)

log = logging.getLogger(__name__)

MOST_FAILED: Final = 0.25  # share of a layer's captions: with more, a run ends with exit code 3


def _lookup(job: RecaptionJob, todo: Incomplete, **more: Any) -> Lookup:
    return Lookup(job.dataset, job.layer, job.slots, job.view.reads, todo.entries, todo.captions, **more)


def _units(job: RecaptionJob, todo: Incomplete, lookup: Lookup, *, sharing: bool) -> list[units.Unit]:
    """Return the units of the incomplete shards, with the files of the captions that they can reuse."""
    reuse, elsewhere = dict(todo.own), dict[str, tuple[str, int]]()
    if todo.scattered:
        found = lookup.find(sharing=sharing)
        for number, (entry, facts) in enumerate(zip(todo.entries, lookup.save(found), strict=True)):
            reuse[entry.name] = aside_name(job.layer, entry) if facts["rows"] else ""
            if facts["elsewhere"]:
                elsewhere[entry.name] = found.file(number), number
    work = []
    for entry in todo.entries:
        spec = {
            "shard": entry.name,
            "entry": entry.model_dump(),
            "source": entry.sha256,
            "reuse": reuse.get(entry.name, ""),
            "elsewhere": elsewhere.get(entry.name, ()),
            "aside": aside_name(job.layer, entry).replace(".parquet", "-own.parquet"),
        }
        work.append(units.Unit(entry.name, spec))
    return work


def _job(recipe: Recipe) -> RecaptionJob:
    config = RecaptionConfig.from_recipe(recipe)
    check_machine(config, recipe.resources)
    config.announce()
    dataset = Dataset(Storage(recipe.dataset, recipe.storage))
    check_clips(dataset, config)
    resources = recipe.resources
    if config.engine == "vllm":
        resources = resources.model_copy(update={"model_workers": _servers(config, resources)})
    workers = resources.model_workers or max(1, resources.gpus or 0)
    job = RecaptionJob(dataset, make(config, workers=workers), config, resources)
    if config.engine == "vllm" and _gpus(resources):
        job.gpus_per_worker = config.vllm.tensor_parallel
    return job


def _servers(config: RecaptionConfig, resources: Resources) -> int:
    """Return the number of servers of engine vllm: one model worker each. Raises RecipeError without enough GPUs."""
    gpus, each = _gpus(resources), config.vllm.tensor_parallel
    if each > 1 and gpus < each:
        problem = f"needs {each} GPUs per server, and {gpus} are there"
        raise RecipeError("recaption.vllm.tensor_parallel", problem, "lower it, or set resources.gpus to the cluster's")
    if config.vllm.replicas != "auto":
        return config.vllm.replicas
    return resources.model_workers or max(1, gpus // each)


def _gpus(resources: Resources) -> int:
    """Return the recipe's number of GPUs, else that of the cluster that RAY_ADDRESS names, else this machine's."""
    if resources.gpus is not None:
        return int(resources.gpus)
    if os.environ.get("RAY_ADDRESS"):
        import ray

        units.start_ray(resources)
        return int(ray.cluster_resources().get("GPU", 0))
    import torch

    return torch.cuda.device_count()


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return what `recaption` would do; write nothing.

    Counts images: `done` are in finished shards. In the other shards, `reused` have all captions of this recipe and
    `new` lack some (`captions` in total). `stale` counts the new images that have captions of another model or recipe.
    `tokens` and `eta_s` are extrapolated from a timed sample whose captions are discarded.
    """
    job = _job(recipe)
    dataset, reads = job.dataset, job.view.reads
    todo = incomplete(dataset, job.layer, job.markers.read())
    others = files_of_others(job.storage, job.layer) if todo.entries else []
    with scratch() as folder:
        work, found = Storage(str(folder)), None
        if todo.scattered or others:
            lookup = _lookup(job, todo, others=others, work=work, resources=None)
            found = lookup.find(sharing=True)
        counts = found.counts if found else counts_of(dataset, todo, job.slots, reads)

        def new() -> Iterator[tuple[str, New]]:
            for number, entry in enumerate(todo.entries):
                if found:
                    have, elsewhere = existing(work, found.file(number), number)
                else:
                    own = todo.own.get(entry.name)
                    have, elsewhere = slots_in(job.storage, own) if own else {}, set()
                yield entry.name, lacking_of(dataset, entry.name, job.slots, have, elsewhere, reads=reads)

        sample = take_sample(dataset, job.view, job.write, new(), job.config.batch)
    total = sum(entry.samples for entry in dataset.manifest.shards)
    pending = sum(entry.samples for entry in todo.entries)
    return {
        "layer": job.layer,
        "shards": len(todo.entries),
        "images": total,
        "done": total - pending,
        "reused": pending - counts["new"],
        "new": counts["new"],
        "stale": counts["stale"],
        "captions": counts["captions"],
        **sample.estimate(counts["captions"], job.resources),
    }


def recaption(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Write or complete the caption layer that the recipe describes; resumes an interrupted run.

    Returns the layer's id and counts of images. Raises Quarantined if shards kept failing; the others are complete.
    Raises CapstanError if another process writes this layer, or the dataset.
    """
    job = _job(recipe)
    with lease(job.storage, "recaption", f"captions/{job.layer}"):
        job.dataset = Dataset(job.storage)  # a takedown may have ended just before
        return _recaption(job, recipe, progress)


def _recaption(job: RecaptionJob, recipe: Recipe, progress: bool) -> dict[str, Any]:
    start = time.perf_counter()
    job.storage.delete(job.stop_file)
    now, touched, waiting, quarantined = Counter[str](), set[str](), set[str](), dict[str, str]()
    for sharing in (True, False):
        marks = job.markers.read()
        todo = incomplete(job.dataset, job.layer, marks)
        if not sharing:
            todo = replace(todo, entries=[entry for entry in todo.entries if entry.name in waiting])
        names = {entry.name for entry in todo.entries}
        lookup = _lookup(job, todo, others=[], work=job.storage, resources=job.resources, progress=progress)
        work = _units(job, todo, lookup, sharing=sharing)
        job.markers.forget(names)
        finished = [units.Unit(shard) for shard in job.dataset.shard_names if shard in marks.keys() - names]
        ended = units.run(job, [*finished, *work], job.resources, progress=progress)
        lookup.clean()
        if ended.done or ended.skipped:
            store.publish(job.storage, job.layer, job.slots, job.description, job.config.lint)
        now.update(_sums(job, names, ("new", "retried")))
        touched |= names
        quarantined |= ended.quarantined
        waiting = {unit.id for unit in work if unit.spec["elsewhere"]}
        if not waiting or job.stopped():
            break
    if quarantined and job.stopped():
        raise CaptionsFailed(f"{len(quarantined):,} shard(s) not captioned: {job.stopped()}")
    if quarantined:
        raise Quarantined(job.name, quarantined)
    job.storage.delete(*job.storage.names(store.aside(job.layer)))
    now.update(_sums(job, touched, ("images", "reused")))
    summary = _summary(job, now, time.perf_counter() - start)
    if why := job.stopped():
        summary["stopped"] = why
    if problem := failure_of(summary):
        log.warning("recaption: %s", problem)
    return summary


def failure_of(summary: Mapping[str, Any]) -> CaptionsFailed | None:
    """Return the error to end with if the engine stopped or a large share failed; `summary` is that of `recaption`."""
    flags = summary["flags"]
    failed = summary["failed"] + flags.get(linter.UNREADABLE, 0)
    total = summary["captions"] + failed
    if why := summary.get("stopped"):
        return CaptionsFailed(f"{failed:,} of {total:,} captions failed: {why}")
    if failed <= MOST_FAILED * total:
        return None
    reasons = Counter({flag: n for flag, n in flags.items() if flag not in linter.known_flags() - {linter.UNREADABLE}})
    shown = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(5))
    return CaptionsFailed(f"{failed:,} of {total:,} captions failed ({shown}); run again to retry them")


def _sums(job: RecaptionJob, shards: set[str], names: Sequence[str]) -> Counter[str]:
    """Sum the counts in the markers of these shards."""
    total = Counter[str]()
    for shard, facts in job.markers.read().items():
        if shard in shards:
            total.update({name: facts[name] for name in names or facts if isinstance(facts[name], int)})
    return total


def _summary(job: RecaptionJob, now: Mapping[str, int], seconds: float) -> dict[str, Any]:
    """Return the counts of the layer and of this run."""
    total = _sums(job, set(job.dataset.shard_names), ())
    return {
        "layer": job.layer,
        "shards": len(job.dataset.shard_names),
        "images": total["images"],
        "done": total["images"] - now["images"],
        "reused": now["reused"],
        "new": now["new"],
        "retried": now["retried"],
        "unreadable": total["unreadable"],
        "failed": total["failed"],
        "captions": total["images"] * len(job.slots) - total["failed"] - total[f"flag_{linter.UNREADABLE}"],
        "flags": {name.removeprefix("flag_"): total[name] for name in sorted(total) if name.startswith("flag_")},
        "seconds": round(seconds, 1),
        "samples_per_s": round(now["new"] / seconds, 2),
    }
