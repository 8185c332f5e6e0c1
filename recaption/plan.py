"""A dataset and a layer → what is left to do: which shards, and which of their images have captions already.

Done means (image sha256, recipe): an image that moved to another shard, or is there twice, is captioned once. Where
prompts quote the original caption, images that came with different ones are different contents.
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

SAMPLE_SECONDS: Final = 20.0  # that a timed sample should take at most, if one image shows how long that is


class Content(NamedTuple):
    """What a caption is made from."""

    sha256: str
    quoted: str  # store.quote of the original caption, where prompts quote it; else ""


@dataclass(frozen=True)
class Image:
    """A row of a shard."""

    key: str
    content: Content
    original: str


def images(dataset: Dataset, shard: str, *, quoting: bool) -> list[Image]:
    """The shard's images in its order; `quoting`: captions depend on the originals too."""
    table = dataset.table(shard, ["key", "sha256", "caption"])
    return [
        Image(key, Content(sha256, store.quote(caption) if quoting else ""), caption)
        for key, sha256, caption in zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    ]


@dataclass(frozen=True)
class Todo:
    """A shard that is to be done."""

    entry: ShardEntry
    wanting: dict[Content, tuple[str, ...]]  # its contents that lack captions, and in which slots
    reused: pa.Table  # rows of its images that have captions of this recipe (store.SCHEMA)
    elsewhere: set[Content]  # of `wanting`, those captioned for another shard, which holds them too

    @property
    def new(self) -> dict[Content, tuple[str, ...]]:
        """What is captioned for this shard, in which slots."""
        return {content: slots for content, slots in self.wanting.items() if content not in self.elsewhere}


def outline(
    dataset: Dataset,
    layer: str,
    slots: Sequence[str],
    done: dict[str, Any],
    *,
    quoting: bool,
    sharing: bool = True,
) -> list[Todo]:
    """The shards that lack captions for what they now hold, and what of theirs was captioned before.

    `done` is what the markers say of shards. With `sharing`, an image that several shards hold is to be captioned for
    the first of them only.
    """
    names = dataset.storage.names(f"{store.ROOT}/{layer}")  # those that were put aside too
    entries = [entry for entry in dataset.manifest.shards if not _is_done(done.get(entry.name), entry, layer, names)]
    own = [{image.content for image in images(dataset, entry.name, quoting=quoting)} for entry in entries]
    found = _captioned(dataset.storage, names, set[Content]().union(*own), slots)
    places: dict[Content, dict[str, int]] = {}
    for place, (content, slot) in enumerate(zip(_contents(found), found["slot"].to_pylist(), strict=True)):
        places.setdefault(content, {})[slot] = place
    todo, taken = list[Todo](), set[Content]()
    for entry, wanted in zip(entries, own, strict=True):
        reused = [place for content in sorted(wanted) for place in places.get(content, {}).values()]
        wanting = {content: lacking(slots, places.get(content, {})) for content in sorted(wanted)}
        wanting = {content: left for content, left in wanting.items() if left}
        todo.append(Todo(entry, wanting, found.take(pa.array(reused, pa.int64())), wanting.keys() & taken))
        if sharing:
            taken |= wanting.keys()
    return todo


def lacking(slots: Sequence[str], have: Collection[str]) -> tuple[str, ...]:
    """The slots that are to be asked for."""
    return tuple(slot for slot in slots if slot not in have)


def _is_done(facts: dict[str, Any] | None, entry: ShardEntry, layer: str, names: list[str]) -> bool:
    """Whether the shard has its captions; those that an engine did not give are asked for again.

    So are images that could not be read: why is not known, and a lack of memory or a package passes.
    """
    if facts is None or facts["source"] != entry.sha256 or facts["failed"] or facts["unreadable"]:
        return False
    return store.file_name(layer, entry.name) in names


def _captioned(storage: Storage, names: list[str], wanted: set[Content], slots: Sequence[str]) -> pa.Table:
    """The rows in these files of contents of `wanted`: one a content and slot, as far as there are (store.SCHEMA)."""
    found, have = [store.SCHEMA.empty_table()], set[tuple[Content, str]]()
    for table in rows_of(storage, names, {content.sha256 for content in wanted}):
        places: dict[tuple[Content, str], int] = {}
        for place, (content, slot) in enumerate(zip(_contents(table), table["slot"].to_pylist(), strict=True)):
            if content in wanted and slot in slots and (content, slot) not in have:
                places.setdefault((content, slot), place)
        have.update(places)
        found.append(table.take(pa.array([places[one] for one in sorted(places)], pa.int64())))
    return pa.concat_tables(found)


def rows_of(storage: Storage, names: list[str], wanted: set[str], columns: list[str] | None = None) -> Iterator[Any]:
    """The captions of images of `wanted` (sha256) in those of the files that are tables of captions, file by file."""
    chosen = pa.array(sorted(wanted), pa.string())
    for name in names if wanted else []:
        if name.endswith(".parquet"):
            table = storage.read_table(name, columns)
            given = pc.not_equal(table["finish"], "none")  # what could not be read or had no answer is tried again
            yield table.filter(pc.and_(pc.is_in(table["sha256"], chosen), given))


def _contents(table: pa.Table) -> list[Content]:
    return [Content(*pair) for pair in zip(table["sha256"].to_pylist(), table["quoted"].to_pylist(), strict=True)]


def count_stale(storage: Storage, layer: str, new: set[str]) -> int:
    """How many images of `new` (sha256) have captions of other models or recipes."""
    others = [other for other in store.list_layers(storage) if other != layer]
    others = [other for other in others if store.is_model(store.layer_recipe(storage, other))]
    names = [name for other in others for name in storage.names(f"{store.ROOT}/{other}")]
    found = rows_of(storage, names, new, ["sha256", "finish"])
    return len({sha256 for table in found for sha256 in table["sha256"].to_pylist()})


Write = Callable[[Sequence[EngineInput], Sequence[Request]], list[dict[str, Row]]]


@dataclass(frozen=True)
class Sample:
    """Images that were captioned for an estimate, and thrown away."""

    images: int = 0
    captions: int = 0
    seconds: float = 0.0
    tokens: int = 0  # in the captions kept

    def estimate(self, captions: int, resources: Resources) -> dict[str, Any]:
        """What so many captions will cost on all model workers."""
        if not self.captions:
            return {"tokens": 0, "eta_s": 0.0, "sample": {}}
        workers = resources.model_workers or max(1, resources.gpus or 0)
        return {
            "tokens": round(self.tokens / self.captions * captions),
            "eta_s": round(self.seconds / self.captions * captions / workers, 3),
            "sample": {"pictures": self.images, "seconds": round(self.seconds, 3), "tokens": self.tokens},
        }


def take_sample(dataset: Dataset, engine: CaptionEngine, write: Write, todo: list[Todo], batch: int) -> Sample:
    """Caption up to a batch of the images that are new. Loading the model is not counted."""
    images, requests = list[EngineInput](), list[Request]()
    for image, request in _new_images(dataset, engine, todo):
        images.append(image)
        requests.append(request)
        if len(images) >= batch:
            break
    if not images:
        return Sample()
    write(images[:1], requests[:1])  # loads the model
    start = time.perf_counter()
    write(images[:1], requests[:1])
    single = time.perf_counter() - start
    count = max(1, min(len(images), int(SAMPLE_SECONDS / single)))
    start = time.perf_counter()
    rows = write(images[:count], requests[:count])
    seconds = time.perf_counter() - start
    made = [row for slots in rows for row in slots.values()]
    return Sample(count, len(made), seconds, sum(row.tokens for row in made))


def _new_images(dataset: Dataset, engine: CaptionEngine, todo: list[Todo]) -> Iterator[tuple[EngineInput, Request]]:
    for shard in todo:
        table, new = images(dataset, shard.entry.name, quoting=engine.uses_original), shard.new
        rows = sorted({image.content: row for row, image in enumerate(table) if image.content in new}.values())
        for row, (_, jpeg) in zip(rows, dataset.read_images(shard.entry.name, rows), strict=True):
            try:
                picture = engine.prepare(jpeg)
            except Exception as error:  # noqa: BLE001 - the sample boundary: `recaption` will flag it
                log.warning("%s: an image cannot be read: %s", shard.entry.name, error)
                continue
            content = table[row].content
            yield picture, Request(content.sha256, new[content], table[row].original)
