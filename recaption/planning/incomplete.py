"""A dataset and a layer → incomplete shards, and captions to reuse

Captions are identified by (image sha256, recipe): an image that moved to another shard, or occurs twice, is captioned
once. If prompts quote the original caption, the same image with different original captions counts as different.

The driver knows shards, markers and names of files. If no other file can have captions of the incomplete shards'
images, which is so for a new layer, a resumed run and new data, they are started at once; else the images are looked up
first (recaption.planning.existing).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.shards import Dataset, ShardEntry
from capstan.pipeline.select.pairs import read_pairs
from capstan.pipeline.storage import Storage
from capstan.recaption import store
from capstan.recaption.engines import EngineInput, Request
from capstan.recaption.planning.contents import Content, Reads, images, lacking
from capstan.recaption.planning.existing import captioned, files_of
from capstan.recaption.planning.frames import View
from capstan.recaption.store import Row

log = logging.getLogger(__name__)

SAMPLE_SECONDS: Final = 20.0  # upper bound for a timed sample, extrapolated from one image


@dataclass(frozen=True)
class Incomplete:
    """The shards without all of their captions.

    `own` maps some of them to their file, which has captions of the shard as it is. `captions` are all files that may
    have captions of their images. `scattered`: more than `own` may have, or an image may be in several of the shards.
    """

    entries: list[ShardEntry]
    own: dict[str, str]
    captions: list[str]
    scattered: bool


def incomplete(dataset: Dataset, layer: str, done: Mapping[str, Any]) -> Incomplete:
    """Return the incomplete shards; `done` maps shards that were captioned to the facts in their markers."""
    names = files_of(dataset.storage.names(f"{store.ROOT}/{layer}"))  # including aside/
    present, finished = set(names), set[str]()
    entries, own = list[ShardEntry](), dict[str, str]()
    for entry in dataset.manifest.shards:
        facts, file = done.get(entry.name), store.file_name(layer, entry.name)
        if _is_done(facts, entry, layer, present):
            finished.add(file)
            continue
        entries.append(entry)
        if facts is not None and facts["source"] == entry.sha256 and file in present:
            own[entry.name] = file
    known = finished | set(own.values()) if _are_unique(dataset) else set(own.values())
    scattered = len(entries) > 1 and not _are_unique(dataset)
    captions = [name for name in names if name not in finished or not _are_unique(dataset)]
    return Incomplete(entries, own, captions, bool(entries) and (scattered or not present <= known))


def _are_unique(dataset: Dataset) -> bool:
    """Return whether no image is in the dataset twice: its selection drops exact repeats, and nobody overruled it."""
    exact = dataset.manifest.recipe.get("dedup", {}).get("exact", False)
    return bool(exact) and not len(read_pairs(dataset.storage))


def _is_done(facts: dict[str, Any] | None, entry: ShardEntry, layer: str, names: Collection[str]) -> bool:
    """Return whether the shard is complete. One with failed captions is not: they are requested again.

    Unreadable images are retried too, since the cause may have been temporary (memory, a missing package).
    """
    if facts is None or facts["source"] != entry.sha256 or facts["failed"] or facts["unreadable"]:
        return False
    return store.file_name(layer, entry.name) in names


def files_of_others(storage: Storage, layer: str) -> list[str]:
    """Return the caption files of other models or recipes."""
    others = [other for other in store.list_layers(storage) if other != layer]
    others = [other for other in others if store.is_model(store.layer_recipe(storage, other))]
    return files_of(name for other in others for name in storage.names(f"{store.ROOT}/{other}"))


New = dict[Content, tuple[str, ...]]  # images of a shard without captions, and their slots


def lacking_of(
    dataset: Dataset,
    shard: str,
    slots: Sequence[str],
    have: Mapping[Content, Collection[str]],
    elsewhere: Collection[Content] = (),
    *,
    reads: Reads,
) -> New:
    """Return the images to caption for a shard, given the slots that they `have`."""
    contents = sorted({image.content for image in images(dataset, shard, reads)} - set(elsewhere))
    missing = {content: lacking(slots, have.get(content, ())) for content in contents}
    return {content: left for content, left in missing.items() if left}


def slots_in(storage: Storage, name: str) -> dict[Content, set[str]]:
    """Return the slots of which a file has captions, by image."""
    have: dict[Content, set[str]] = {}
    rows = captioned(storage.read_table(name, ["sha256", "quoted", "slot", "finish"]))
    for sha256, quoted, slot in zip(
        *(rows[column].to_pylist() for column in ("sha256", "quoted", "slot")), strict=True
    ):
        have.setdefault(Content(sha256, quoted), set()).add(slot)
    return have


def counts_of(dataset: Dataset, todo: Incomplete, slots: Sequence[str], reads: Reads) -> Counter[str]:
    """Return the numbers of `new` images and of their `captions`, for shards that are not `scattered`."""
    counts = Counter[str]()
    for entry in todo.entries:
        if entry.name in todo.own:
            have = slots_in(dataset.storage, todo.own[entry.name])
            new = lacking_of(dataset, entry.name, slots, have, reads=reads)
            counts.update({"new": len(new), "captions": sum(map(len, new.values()))})
        else:
            counts.update({"new": entry.samples, "captions": entry.samples * len(slots)})
    return counts


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


def take_sample(dataset: Dataset, view: View, write: Write, todo: Iterable[tuple[str, New]], batch: int) -> Sample:
    """Caption up to a batch of the new images of shards and time it, without loading the model."""
    inputs, requests = list[EngineInput](), list[Request]()
    for engine_input, request in _new_images(dataset, view, todo):
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


def _new_images(dataset: Dataset, view: View, todo: Iterable[tuple[str, New]]) -> Iterator[tuple[EngineInput, Request]]:
    for shard, new in todo:
        table = images(dataset, shard, view.reads)
        rows = sorted({image.content: row for row, image in enumerate(table) if image.content in new}.values())
        for row, (_, jpeg, parts) in zip(rows, view.samples(dataset, shard, rows), strict=True):
            try:
                engine_input = view.prepare(jpeg, parts)
            except Exception as error:  # noqa: BLE001 - sample boundary: `recaption` will flag it
                log.warning("%s: cannot read an image: %s", shard, error)
                continue
            content = table[row].content
            yield engine_input, Request(content.sha256, new[content], table[row].original)
