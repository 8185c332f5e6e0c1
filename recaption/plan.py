"""A dataset and a layer → incomplete shards, and captions to reuse

Captions are identified by (image sha256, recipe): an image that moved to another shard, or occurs twice, is captioned
once. If prompts quote the original caption, the same image with different original captions counts as different.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.shards import Dataset, ShardEntry
from capstan.pipeline.storage import Storage
from capstan.recaption import store
from capstan.recaption.engines import CaptionEngine, EngineInput, Request
from capstan.recaption.store import Row

log = logging.getLogger(__name__)

SAMPLE_SECONDS: Final = 20.0  # upper bound for a timed sample, extrapolated from one image


class Content(NamedTuple):
    """The input of a caption: an image, and the original caption if prompts quote it."""

    sha256: str
    quoted: str  # store.quote of the original caption if prompts quote it, else ""


@dataclass(frozen=True)
class Image:
    """A row of a shard."""

    key: str
    content: Content
    original: str


def images(dataset: Dataset, shard: str, *, quoting: bool) -> list[Image]:
    """Return the shard's images in its order; `quoting`: captions also depend on the original captions."""
    table = dataset.table(shard, ["key", "sha256", "caption"])
    return [
        Image(key, Content(sha256, store.quote(caption) if quoting else ""), caption)
        for key, sha256, caption in zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    ]


@dataclass(frozen=True)
class Todo:
    """A shard without all of its captions."""

    entry: ShardEntry
    missing: dict[Content, tuple[str, ...]]  # contents without captions, and their slots
    reused: pa.Table  # caption rows of this recipe for its images (store.SCHEMA)
    elsewhere: set[Content]  # those of `missing` that are captioned for another shard

    @property
    def new(self) -> dict[Content, tuple[str, ...]]:
        """Contents to caption for this shard, and their slots."""
        return {content: slots for content, slots in self.missing.items() if content not in self.elsewhere}


def outline(
    dataset: Dataset,
    layer: str,
    slots: Sequence[str],
    done: dict[str, Any],
    *,
    quoting: bool,
    sharing: bool = True,
) -> list[Todo]:
    """Return the incomplete shards, with the existing captions of their images.

    `done` maps finished shards to the facts in their markers. With `sharing`, an image in several shards is captioned
    only for the first of them.
    """
    names = dataset.storage.names(f"{store.ROOT}/{layer}")  # including aside/
    present = set(names)
    entries = [entry for entry in dataset.manifest.shards if not _is_done(done.get(entry.name), entry, layer, present)]
    own = [{image.content for image in images(dataset, entry.name, quoting=quoting)} for entry in entries]
    captions = _captioned(dataset.storage, names, set[Content]().union(*own), slots)
    places: dict[Content, dict[str, int]] = {}
    for place, (content, slot) in enumerate(zip(_contents(captions), captions["slot"].to_pylist(), strict=True)):
        places.setdefault(content, {})[slot] = place
    todo, assigned = list[Todo](), set[Content]()
    for entry, wanted in zip(entries, own, strict=True):
        reused = [place for content in sorted(wanted) for place in places.get(content, {}).values()]
        missing = {content: lacking(slots, places.get(content, {})) for content in sorted(wanted)}
        missing = {content: left for content, left in missing.items() if left}
        rows = captions.take(pa.array(reused, pa.int64()))
        todo.append(Todo(entry, missing, rows, missing.keys() & assigned))
        if sharing:
            assigned |= missing.keys()
    return todo


def lacking(slots: Sequence[str], have: Collection[str]) -> tuple[str, ...]:
    """Return the slots without a caption."""
    return tuple(slot for slot in slots if slot not in have)


def _is_done(facts: dict[str, Any] | None, entry: ShardEntry, layer: str, names: Collection[str]) -> bool:
    """Return whether the shard is complete. One with failed captions is not: they are requested again.

    Unreadable images are retried too, since the cause may have been temporary (memory, a missing package).
    """
    if facts is None or facts["source"] != entry.sha256 or facts["failed"] or facts["unreadable"]:
        return False
    return store.file_name(layer, entry.name) in names


def _captioned(storage: Storage, names: list[str], wanted: set[Content], slots: Sequence[str]) -> pa.Table:
    """Return existing rows of contents in `wanted`: at most one per content and slot (store.SCHEMA)."""
    tables, have = [store.SCHEMA.empty_table()], set[tuple[Content, str]]()
    for table in rows_of(storage, names, {content.sha256 for content in wanted}):
        places: dict[tuple[Content, str], int] = {}
        for place, (content, slot) in enumerate(zip(_contents(table), table["slot"].to_pylist(), strict=True)):
            if content in wanted and slot in slots and (content, slot) not in have:
                places.setdefault((content, slot), place)
        have.update(places)
        tables.append(table.take(pa.array([places[one] for one in sorted(places)], pa.int64())))
    return pa.concat_tables(tables)


def rows_of(storage: Storage, names: list[str], wanted: set[str], columns: list[str] | None = None) -> Iterator[Any]:
    """Yield, for each caption table among the files, its rows of images in `wanted` (sha256)."""
    chosen = pa.array(sorted(wanted), pa.string())
    for name in names if wanted else []:
        if name.endswith(".parquet"):
            table = storage.read_table(name, columns)
            captioned = pc.not_equal(table["finish"], "none")  # unreadable and failed ones are retried
            yield table.filter(pc.and_(pc.is_in(table["sha256"], chosen), captioned))


def _contents(table: pa.Table) -> list[Content]:
    return [Content(*pair) for pair in zip(table["sha256"].to_pylist(), table["quoted"].to_pylist(), strict=True)]


def count_stale(storage: Storage, layer: str, new: set[str]) -> int:
    """Count the images in `new` (sha256) that have captions of other models or recipes."""
    others = [other for other in store.list_layers(storage) if other != layer]
    others = [other for other in others if store.is_model(store.layer_recipe(storage, other))]
    names = [name for other in others for name in storage.names(f"{store.ROOT}/{other}")]
    tables = rows_of(storage, names, new, ["sha256", "finish"])
    return len({sha256 for table in tables for sha256 in table["sha256"].to_pylist()})


Write = Callable[[Sequence[EngineInput], Sequence[Request]], list[dict[str, Row]]]


@dataclass(frozen=True)
class Sample:
    """Images captioned for an estimate; their captions are discarded."""

    images: int = 0
    captions: int = 0
    seconds: float = 0.0
    tokens: int = 0  # in the final captions, retries not counted

    def estimate(self, captions: int, resources: Resources) -> dict[str, Any]:
        """Return the cost of the given number of captions on all model workers."""
        if not self.captions:
            return {"tokens": 0, "eta_s": 0.0, "sample": {}}
        workers = resources.model_workers or max(1, resources.gpus or 0)
        return {
            "tokens": round(self.tokens / self.captions * captions),
            "eta_s": round(self.seconds / self.captions * captions / workers, 3),
            "sample": {"pictures": self.images, "seconds": round(self.seconds, 3), "tokens": self.tokens},
        }


def take_sample(dataset: Dataset, engine: CaptionEngine, write: Write, todo: list[Todo], batch: int) -> Sample:
    """Caption up to a batch of the new images and time it, without loading the model."""
    inputs, requests = list[EngineInput](), list[Request]()
    for engine_input, request in _new_images(dataset, engine, todo):
        inputs.append(engine_input)
        requests.append(request)
        if len(inputs) >= batch:
            break
    if not inputs:
        return Sample()
    write(inputs[:1], requests[:1])  # loads the model
    start = time.perf_counter()
    write(inputs[:1], requests[:1])
    single = time.perf_counter() - start
    count = max(1, min(len(inputs), int(SAMPLE_SECONDS / single)))
    start = time.perf_counter()
    rows = write(inputs[:count], requests[:count])
    seconds = time.perf_counter() - start
    captions = [row for slots in rows for row in slots.values()]
    return Sample(count, len(captions), seconds, sum(row.tokens for row in captions))


def _new_images(dataset: Dataset, engine: CaptionEngine, todo: list[Todo]) -> Iterator[tuple[EngineInput, Request]]:
    for shard in todo:
        table, new = images(dataset, shard.entry.name, quoting=engine.uses_original), shard.new
        rows = sorted({image.content: row for row, image in enumerate(table) if image.content in new}.values())
        for row, (_, jpeg) in zip(rows, dataset.read_images(shard.entry.name, rows), strict=True):
            try:
                engine_input = engine.prepare(jpeg)
            except Exception as error:  # noqa: BLE001 - sample boundary: `recaption` will flag it
                log.warning("%s: cannot read an image: %s", shard.entry.name, error)
                continue
            content = table[row].content
            yield engine_input, Request(content.sha256, new[content], table[row].original)
