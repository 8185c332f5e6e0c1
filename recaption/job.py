"""A dataset and a recipe → a caption layer, shard by shard through the unit map.

    plan      which shards are to be done, and which of their images have captions of this recipe already
    prepare   on CPU workers: JPEG → pixels, only of images without one
    model     on model workers: the engine
    commit    in the driver: one Parquet file a shard

Done means (image sha256, recipe): images that moved to another shard keep their captions, and new data
costs only itself.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import units
from pipeline.config import Recipe, Resources
from pipeline.errors import Quarantined
from pipeline.shards import Dataset, ShardEntry
from pipeline.storage import Storage
from recaption import store
from recaption.config import RecaptionConfig
from recaption.engines import CaptionEngine, Picture, Request, make, size_of

log = logging.getLogger(__name__)

# What travels to a model worker at a time: whole batches, as many as stay below both.
PIECE_BYTES: Final = 8 << 20
PIECE_BATCHES: Final = 8
UNREADABLE: Final = store.Row.unreadable()


class RecaptionJob(units.Job):
    """One caption layer; a unit is a shard."""

    def __init__(self, dataset: Dataset, engine: CaptionEngine, config: RecaptionConfig, resources: Resources) -> None:
        self.dataset, self.storage, self.engine = dataset, dataset.storage, engine
        self.config, self.slots, self.resources = config, config.slots, resources
        self.layer = store.layer_id(engine.describe())
        self.name = f"recaption-{self.layer}"

    def prepare(self, unit: units.Unit) -> Iterator[units.Piece]:
        shard = unit.spec["shard"]
        table = self.dataset.table(shard, ["key", "sha256"])
        sums = table["sha256"].to_pylist()
        reused = self._reused(unit)
        first = {sha256: row for row, sha256 in reversed(list(enumerate(sums))) if sha256 not in reused}
        rows = sorted(first.values())
        piece = _Piece()
        for row, (_, jpeg) in zip(rows, self.dataset.read_images(shard, rows), strict=True):
            try:
                piece.add(sums[row], self.engine.prepare(jpeg))
            except Exception as error:  # noqa: BLE001 - the sample boundary: a broken image is a row with a flag
                log.warning("%s: image %s cannot be read: %s", shard, sums[row], error)
                units.report({"failed.unreadable": 1})
                piece.broken.append(sums[row])
            if piece.is_full(self.config.batch):
                yield piece.wire()
                piece = _Piece()
        if piece.sums or piece.broken:
            yield piece.wire()

    def model(self) -> Callable[[units.Piece], units.Piece]:
        import torch

        torch.set_num_threads(units.model_threads(self.resources))

        def apply(piece: units.Piece) -> units.Piece:
            requests = [Request(sha256, tuple(self.slots)) for sha256 in piece["sha256"]]
            captions = self.engine.caption(piece["pictures"], requests) if requests else []
            units.report({"samples": len(captions)})
            rows = [
                {slot: store.Row.written(c.raw, c.tokens, c.finish, c.seed) for slot, c in texts.items()}
                for texts in captions
            ]
            return {"rows": dict(zip(piece["sha256"], rows, strict=True)), "broken": piece["broken"]}

        return apply

    def commit(self, unit: units.Unit, pieces: list[units.Piece]) -> dict[str, Any]:
        reused = self._reused(unit)
        captions = dict(reused)
        for piece in pieces:
            captions.update(piece["rows"])
            captions.update({sha256: dict.fromkeys(self.slots, UNREADABLE) for sha256 in piece["broken"]})
        table = self.dataset.table(unit.spec["shard"], ["key", "sha256"])
        images = list(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True))
        store.write_rows(
            self.storage,
            self.layer,
            unit.spec["shard"],
            ((key, sha256, slot, captions[sha256][slot]) for key, sha256 in images for slot in self.slots),
        )
        flags = Counter(flag for _, sha256 in images for row in captions[sha256].values() for flag in row.flags)
        return {
            "source": unit.spec["source"],  # what the shard held: another sum there means that it is to be done again
            "images": len(images),
            "new": sum(len(piece["rows"]) for piece in pieces),
            "reused": sum(sha256 in reused for _, sha256 in images),
            "unreadable": sum(len(piece["broken"]) for piece in pieces),
            **{f"flag_{flag}": count for flag, count in sorted(flags.items())},
        }

    def _reused(self, unit: units.Unit) -> dict[str, dict[str, store.Row]]:
        """sha256 → slot → row of the unit's images that have captions already."""
        if not unit.spec["reuse"]:
            return {}
        found: dict[str, dict[str, store.Row]] = {}
        for row in self.storage.read_table(unit.spec["reuse"]).to_pylist():
            sha256, slot = row.pop("sha256"), row.pop("slot")
            del row["key"]
            found.setdefault(sha256, {})[slot] = store.Row(**{**row, "flags": tuple(row["flags"])})
        return found


class _Piece:
    """What `prepare` has gathered so far."""

    def __init__(self) -> None:
        self.sums: list[str] = []
        self.pictures: list[Picture] = []
        self.broken: list[str] = []
        self.bytes = 0

    def add(self, sha256: str, picture: Picture) -> None:
        self.sums.append(sha256)
        self.pictures.append(picture)
        self.bytes += size_of(picture)

    def is_full(self, batch: int) -> bool:
        return len(self.sums) % batch == 0 and (len(self.sums) >= PIECE_BATCHES * batch or self.bytes >= PIECE_BYTES)

    def wire(self) -> units.Piece:
        return {"sha256": self.sums, "pictures": self.pictures, "broken": self.broken}


# Planning ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Todo:
    """A shard that is to be done."""

    entry: ShardEntry
    sums: set[str]  # sha256 of its images
    reused: pa.Table  # rows of its images that have captions of this recipe (store.SCHEMA)

    @property
    def new(self) -> set[str]:
        return self.sums - set(self.reused["sha256"].to_pylist())


def outline(job: RecaptionJob) -> list[Todo]:
    """The shards that have no captions for what they now hold, and what of theirs was captioned before."""
    names = job.storage.names(f"{store.ROOT}/{job.layer}") + job.storage.names(_reuse_folder(job))
    done = {unit: facts["source"] for unit, facts in units.markers(job).items()}
    entries = [
        entry
        for entry in job.dataset.manifest.shards
        if done.get(entry.name) != entry.sha256 or store.file_name(job.layer, entry.name) not in names
    ]
    sums = [set(job.dataset.table(entry.name, ["sha256"])["sha256"].to_pylist()) for entry in entries]
    found = _captioned(job.storage, names, set[str]().union(*sums), job.slots)
    places: dict[str, list[int]] = {}
    for place, sha256 in enumerate(found["sha256"].to_pylist()):
        places.setdefault(sha256, []).append(place)
    return [
        Todo(entry, own, found.take(pa.array([p for sha in sorted(own) for p in places.get(sha, [])], pa.int64())))
        for entry, own in zip(entries, sums, strict=True)
    ]


def _captioned(storage: Storage, names: list[str], wanted: set[str], slots: list[str]) -> pa.Table:
    """The rows in these files of images of `wanted` that have every slot: one an image and slot (store.SCHEMA)."""
    found, have = [store.SCHEMA.empty_table()], set[str]()
    for table in _rows_of(storage, names, wanted):
        places: dict[str, dict[str, int]] = {}
        for place, (sha256, slot) in enumerate(zip(*(table[n].to_pylist() for n in ("sha256", "slot")), strict=True)):
            places.setdefault(sha256, {}).setdefault(slot, place)
        new = [sha256 for sha256 in sorted(places) if places[sha256].keys() >= set(slots) and sha256 not in have]
        have.update(new)
        found.append(table.take(pa.array([places[sha256][slot] for sha256 in new for slot in slots], pa.int64())))
    return pa.concat_tables(found)


def _rows_of(storage: Storage, names: list[str], wanted: set[str]) -> Iterator[pa.Table]:
    """The captions of images of `wanted` in those of the files that are tables of captions, file by file."""
    chosen = pa.array(sorted(wanted), pa.string())
    for name in names if wanted else []:
        if name.endswith(".parquet"):
            table = storage.read_table(name)
            readable = pc.not_equal(table["finish"], UNREADABLE.finish)  # what could not be read is tried again
            yield table.filter(pc.and_(pc.is_in(table["sha256"], chosen), readable))


def _reuse_folder(job: RecaptionJob) -> str:
    return f"state/{job.name}/reuse"


def _units(job: RecaptionJob, todo: list[Todo]) -> list[units.Unit]:
    """Every shard as a unit. Captions that are to be kept are put aside first: committing one shard may overwrite the
    file in which another shard's images have theirs."""
    reuse: dict[str, str] = {}
    for shard in todo:
        if len(shard.reused):
            name = f"{_reuse_folder(job)}/{shard.entry.name}-{shard.entry.sha256[:16]}.parquet"
            if not job.storage.exists(name):
                job.storage.write_table(name, shard.reused)
            reuse[shard.entry.name] = name
    return [
        units.Unit(entry.name, {"shard": entry.name, "source": entry.sha256, "reuse": reuse.get(entry.name, "")})
        for entry in job.dataset.manifest.shards
    ]


def _job(recipe: Recipe) -> RecaptionJob:
    config = RecaptionConfig.from_recipe(recipe)
    dataset = Dataset(Storage(recipe.dataset, recipe.storage))
    return RecaptionJob(dataset, make(config), config, recipe.resources)


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `recaption` would do; changes nothing.

    Counts images: `done` in finished shards; of the others `reused` have captions of this recipe, `new` have none, and
    of these `stale` have captions of another model or recipe only. `eta_s` comes from captioning one batch.
    """
    job = _job(recipe)
    todo = outline(job)
    new = set[str]().union(*(shard.new for shard in todo))
    others = [layer for layer in store.list_layers(job.storage) if layer != job.layer and _by_model(job.storage, layer)]
    names = [name for layer in others for name in job.storage.names(f"{store.ROOT}/{layer}")]
    stale = {sha256 for table in _rows_of(job.storage, names, new) for sha256 in table["sha256"].to_pylist()}
    images = sum(entry.samples for entry in job.dataset.manifest.shards)
    pending = sum(shard.entry.samples for shard in todo)
    rate = _timed(job, todo) if new else 0.0
    return {
        "layer": job.layer,
        "shards": len(todo),
        "images": images,
        "done": images - pending,
        "reused": pending - len(new),
        "new": len(new),
        "stale": len(stale),
        "samples_per_s": round(rate, 2),
        "eta_s": round(len(new) / rate, 3) if rate else 0.0,
    }


def _by_model(storage: Storage, layer: str) -> bool:
    """Whether the layer's captions were written by a model: those that people gave do not grow stale."""
    return bool(store.layer_recipe(storage, layer)["engine"]["engine"] != store.GIVEN)


def _timed(job: RecaptionJob, todo: list[Todo]) -> float:
    """Images a second over all model workers, from one batch of what is to be captioned; loading is not counted."""
    batch, pictures = job.config.batch, list[Picture]()
    for shard in todo:
        for _, jpeg in job.dataset.read_images(shard.entry.name, range(min(batch, shard.entry.samples))):
            try:
                pictures.append(job.engine.prepare(jpeg))
            except Exception as error:  # noqa: BLE001 - the sample boundary: `recaption` will flag it
                log.warning("%s: an image cannot be read: %s", shard.entry.name, error)
        if len(pictures) >= batch:
            break
    if not pictures:
        return 0.0
    apply, images = job.model(), pictures[:batch]
    keys = [f"{number}" for number in range(len(images))]
    apply({"sha256": keys[:1], "pictures": images[:1], "broken": []})
    start = time.perf_counter()
    apply({"sha256": keys, "pictures": images, "broken": []})
    workers = job.resources.model_workers or max(1, job.resources.gpus or 0)
    return len(images) / (time.perf_counter() - start) * workers


# Running -------------------------------------------------------------------------------------------------------------


def recaption(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Add or complete the caption layer that the recipe describes; goes on where it was stopped.

    Gives the layer's id and counts of images. Raises Quarantined when shards kept failing; the others are done then.
    """
    job, start = _job(recipe), time.perf_counter()
    todo = outline(job)
    work = _units(job, todo)
    units.forget(job, [shard.entry.name for shard in todo])
    ended = units.run(job, work, recipe.resources, progress=progress)
    if ended.done or ended.skipped:
        store.publish(job.storage, job.layer, job.slots, job.engine.describe())
    if ended.quarantined:
        raise Quarantined(job.name, ended.quarantined)
    for name in job.storage.names(_reuse_folder(job)):
        job.storage.delete(name)
    return _summary(job, {shard.entry.name for shard in todo}, time.perf_counter() - start)


def _summary(job: RecaptionJob, todo: set[str], seconds: float) -> dict[str, Any]:
    """What the layer holds now, and what was done for it by this run."""
    shards = set(job.dataset.shard_names)
    facts = {shard: fact for shard, fact in units.markers(job).items() if shard in shards}
    total = Counter[str]()
    for fact in facts.values():
        total.update({name: value for name, value in fact.items() if isinstance(value, int)})
    now = Counter[str]()
    for shard in todo:
        now.update({name: facts[shard][name] for name in ("images", "new", "reused")})
    return {
        "layer": job.layer,
        "shards": len(facts),
        "images": total["images"],
        "done": total["images"] - now["images"],
        "reused": now["reused"],
        "new": now["new"],
        "unreadable": total["unreadable"],
        "flags": {name.removeprefix("flag_"): total[name] for name in sorted(total) if name.startswith("flag_")},
        "seconds": round(seconds, 1),
        "samples_per_s": round(now["new"] / seconds, 2),
    }
