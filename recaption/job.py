"""A dataset and a recipe → a caption layer, shard by shard

    plan      which shards are incomplete, and which of their images already have captions of this recipe
    prepare   on CPU workers: JPEG → engine input, only for images without captions
    model     on model workers: captions, lint rules, retries
    commit    in the driver: one Parquet file per shard

An image in several new shards is captioned for the first of them. A second pass copies its captions to the others.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from capstan.pipeline import units
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import CapstanError, Quarantined, RecipeError
from capstan.pipeline.lease import lease
from capstan.pipeline.storage import Storage
from capstan.recaption import generate, store
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import CaptionEngine, EngineInput, Request, make, size_of
from capstan.recaption.lint import linter
from capstan.recaption.machine import check_machine
from capstan.recaption.plan import Content, Image, Todo, count_stale, images, lacking, outline, take_sample
from capstan.recaption.store import Place, Row

log = logging.getLogger(__name__)

MOST_FAILED: Final = 0.25  # share of a layer's captions: with more, a run ends with exit code 3

# Bounds of a piece sent to a model worker: as many whole batches as stay below both.
PIECE_BYTES: Final = 8 << 20
PIECE_BATCHES: Final = 8

Captions = dict[Content, dict[str, Row]]


class CaptionsFailed(CapstanError):
    """A run that kept what was captioned, while a large share of the captions failed or the engine stopped."""

    exit_code = 3


class RecaptionJob(units.Job):
    """The job that writes one caption layer. A unit is a shard."""

    def __init__(self, dataset: Dataset, engine: CaptionEngine, config: RecaptionConfig, resources: Resources) -> None:
        self.dataset, self.storage, self.engine = dataset, dataset.storage, engine
        self.config, self.slots, self.resources = config, tuple(config.slots), resources
        self.description = engine.describe()
        self.layer = store.layer_id(self.description, config.lint)
        self.name = f"recaption-{self.layer}"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"dataset": self.dataset.part()}  # a unit has the entry of its shard

    @property
    def stop_file(self) -> str:
        """The file that says why an engine stopped: shards that have not started are then left for the next run."""
        return f"state/recaption-stopped/{self.layer}.json"

    def prepare(self, unit: units.Unit) -> Iterator[units.Piece]:
        if why := self.stopped():
            raise CaptionsFailed(f"not captioned: {why}")
        shard, table, dataset = unit.spec["shard"], self._images(unit), self.dataset.part(unit.spec["entry"])
        reused, elsewhere = self._reused(unit), self._elsewhere(unit)
        missing = {image.content: lacking(self.slots, reused.get(image.content, {})) for image in table}
        first = {image.content: row for row, image in reversed(list(enumerate(table)))}
        rows = sorted(row for content, row in first.items() if missing[content] and content not in elsewhere)
        piece = _Piece()
        for row, (_, jpeg) in zip(rows, dataset.read_images(shard, rows), strict=True):
            try:
                engine_input = self.engine.prepare(jpeg)
            except Exception as error:  # noqa: BLE001 - sample boundary: a broken image becomes a flagged row
                log.warning("%s: cannot read image %s: %s", shard, table[row].content.sha256, error)
                slots = len(missing[table[row].content])
                units.report({"samples": slots, "failed.unreadable": slots})
                piece.broken.append(table[row].content)
            else:
                piece.add(table[row], missing[table[row].content], engine_input)
            if piece.is_full(self.config.batch):
                yield piece.wire()
                piece = _Piece()
        if piece.contents or piece.broken:
            yield piece.wire()

    def model(self) -> Callable[[units.Piece], units.Piece]:
        import torch

        torch.set_num_threads(units.model_threads(self.resources))

        def apply(piece: units.Piece) -> units.Piece:
            requests = [
                Request(content.sha256, slots, original)
                for content, slots, original in zip(piece["contents"], piece["slots"], piece["originals"], strict=True)
            ]
            rows = self.write(piece["inputs"], requests) if requests else []
            if why := getattr(self.engine, "stopped", ""):
                self.stop(why)
            units.report({"samples": sum(map(len, rows)), "retried": _retried(rows), **_failures(rows)})
            return {"rows": dict(zip(piece["contents"], rows, strict=True)), "broken": piece["broken"]}

        return apply

    def write(self, inputs: Sequence[EngineInput], requests: Sequence[Request]) -> list[dict[str, Row]]:
        """Return slot → row for each image."""
        return generate.write(self.engine, inputs, requests, self.config.lint, self.description.get("prompts", {}))

    def stopped(self) -> str:
        """Return why an engine of this run stopped; "" if none did."""
        names = self.storage.names("state/recaption-stopped")
        return str(json.loads(self.storage.read(self.stop_file))["reason"]) if self.stop_file in names else ""

    def stop(self, why: str) -> None:
        """Leave the shards that have not started for the next run."""
        if not self.stopped():
            self.storage.write(self.stop_file, json.dumps({"reason": why}).encode())

    def commit(self, unit: units.Unit, pieces: list[units.Piece]) -> dict[str, Any]:
        table, reused = self._images(unit), self._reused(unit)
        made = {content: rows for piece in pieces for content, rows in piece["rows"].items()}
        broken = {content for piece in pieces for content in piece["broken"]}
        unread = {content: dict.fromkeys(self.slots, Row.missing(linter.UNREADABLE)) for content in broken}
        captions = {
            content: unread.get(content, {}) | made.get(content, {}) | reused.get(content, {})
            for content in unread.keys() | made.keys() | reused.keys()
        }
        rows = [
            (Place(image.key, *image.content, slot), captions[image.content][slot].with_original(image.original))
            for image in table
            for slot in self.slots
            if slot in captions.get(image.content, {})
        ]
        waits = bool(self._elsewhere(unit))
        store.write_rows(self.storage, unit.spec["aside"] if waits else self._file(unit), rows)
        flags = Counter(flag for _, row in rows for flag in row.flags)
        return {
            # The shard's checksum: if it changes, the shard is captioned again.
            "source": "" if waits else unit.spec["source"],
            "images": len(table),
            "new": len(made),
            "reused": sum(not lacking(self.slots, reused.get(image.content, {})) for image in table),
            "retried": _retried(made.values()),
            "unreadable": len(broken),
            "failed": flags[linter.FAILED],
            **{f"flag_{flag}": count for flag, count in sorted(flags.items())},
        }

    def _file(self, unit: units.Unit) -> str:
        return store.file_name(self.layer, unit.spec["shard"])

    def _elsewhere(self, unit: units.Unit) -> set[Content]:
        """Return the unit's images that are captioned for another unit."""
        return {Content(*content) for content in unit.spec["elsewhere"]}

    def _images(self, unit: units.Unit) -> list[Image]:
        dataset = self.dataset.part(unit.spec["entry"])
        return images(dataset, unit.spec["shard"], quoting=self.engine.uses_original)

    def _reused(self, unit: units.Unit) -> Captions:
        """Return content → slot → row of the captions that the unit's images already have."""
        reused: Captions = {}
        for row in self.storage.read_table(unit.spec["reuse"]).to_pylist() if unit.spec["reuse"] else []:
            del row["key"]
            content, slot = Content(row.pop("sha256"), row.pop("quoted")), row.pop("slot")
            lists = {name: tuple(row[name]) for name in ("flags", "discarded")}
            reused.setdefault(content, {})[slot] = Row(**{**row, **lists})
        return reused


def _retried(rows: Iterable[Mapping[str, Row]]) -> int:
    """Count the captions that took more than one attempt."""
    return sum(bool(row.discarded) for slots in rows for row in slots.values())


def _failures(rows: Iterable[Mapping[str, Row]]) -> dict[str, int]:
    """Count the captions that failed as `failed.<reason>`, for the display."""
    flags = (flag for slots in rows for row in slots.values() if linter.FAILED in row.flags for flag in row.flags)
    return Counter(f"failed.{flag}" for flag in flags if flag != linter.FAILED)


class _Piece:
    """A piece that `prepare` is filling."""

    def __init__(self) -> None:
        self.contents: list[Content] = []
        self.slots: list[tuple[str, ...]] = []  # to caption
        self.originals: list[str] = []
        self.inputs: list[EngineInput] = []
        self.broken: list[Content] = []
        self.bytes = 0

    def add(self, image: Image, slots: tuple[str, ...], engine_input: EngineInput) -> None:
        self.contents.append(image.content)
        self.slots.append(slots)
        self.originals.append(image.original)
        self.inputs.append(engine_input)
        self.bytes += size_of(engine_input)

    def is_full(self, batch: int) -> bool:
        count = len(self.contents)
        return count > 0 and count % batch == 0 and (count >= PIECE_BATCHES * batch or self.bytes >= PIECE_BYTES)

    def wire(self) -> units.Piece:
        return {name: value for name, value in vars(self).items() if name != "bytes"}


def _outline(job: RecaptionJob, *, sharing: bool = True) -> list[Todo]:
    done, quoting = job.markers.read(), job.engine.uses_original
    return outline(job.dataset, job.layer, job.slots, done, quoting=quoting, sharing=sharing)


def _units(job: RecaptionJob, todo: list[Todo]) -> list[units.Unit]:
    """Return the units, finished ones included. Captions to reuse are saved in aside/ first: committing one shard may
    overwrite the file that holds the captions of another shard's images.
    """
    left, marked = {shard.entry.name for shard in todo}, job.markers.read().keys()
    work = [units.Unit(shard) for shard in job.dataset.shard_names if shard in marked - left]
    for shard in todo:
        name = f"{store.aside(job.layer)}/{shard.entry.name}-{shard.entry.sha256[:16]}"
        if len(shard.reused):
            job.storage.write_table(f"{name}.parquet", shard.reused)
        spec = {
            "shard": shard.entry.name,
            "entry": shard.entry.model_dump(),
            "source": shard.entry.sha256,
            "reuse": f"{name}.parquet" if len(shard.reused) else "",
            "elsewhere": sorted(shard.elsewhere),
            "aside": f"{name}-own.parquet",
        }
        work.append(units.Unit(shard.entry.name, spec))
    return work


def _job(recipe: Recipe) -> RecaptionJob:
    config = RecaptionConfig.from_recipe(recipe)
    check_machine(config, recipe.resources)
    config.announce()
    dataset = Dataset(Storage(recipe.dataset, recipe.storage))
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
    todo = _outline(job)
    new = {content: slots for shard in todo for content, slots in shard.new.items()}
    captions = sum(map(len, new.values()))
    sample = take_sample(job.dataset, job.engine, job.write, todo, job.config.batch)
    total = sum(entry.samples for entry in job.dataset.manifest.shards)
    pending = sum(shard.entry.samples for shard in todo)
    return {
        "layer": job.layer,
        "shards": len(todo),
        "images": total,
        "done": total - pending,
        "reused": pending - len(new),
        "new": len(new),
        "stale": count_stale(job.storage, job.layer, {content.sha256 for content in new}),
        "captions": captions,
        **sample.estimate(captions, job.resources),
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
        todo = [shard for shard in _outline(job, sharing=sharing) if sharing or shard.entry.name in waiting]
        names = {shard.entry.name for shard in todo}
        work = _units(job, todo)
        job.markers.forget(names)
        ended = units.run(job, work, job.resources, progress=progress)
        if ended.done or ended.skipped:
            store.publish(job.storage, job.layer, job.slots, job.description, job.config.lint)
        now.update(_sums(job, names, ("new", "retried")))
        touched |= names
        quarantined |= ended.quarantined
        waiting = {shard.entry.name for shard in todo if shard.elsewhere}
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
