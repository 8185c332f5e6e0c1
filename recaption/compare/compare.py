"""Two caption layers → what tells them apart, on a sample of the dataset's images.

    captions/diff-A-B.json    the numbers
    captions/diff-A-B.html    the same for people, self-contained
    captions/diff-A-B.png     the images on which the two disagree most

Keys are hashes, so the first images in key order are a random sample, and the same one in every comparison.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption import store
from capstan.recaption.compare import contact_sheet, metrics
from capstan.recaption.compare.clip import Clip, Embeddings
from capstan.recaption.lint import linter

ORIGINAL: Final = "original"
DEFAULT_SLOT: Final = "descriptive"
NEIGHBOURS: Final = 9
DISAGREEMENTS: Final = 8  # shown for each side


@dataclass
class Side:
    """One of the two: a slot of a layer, or the original captions."""

    layer: str | None
    slot: str
    flags: Counter[str] = field(default_factory=Counter)  # over all captions that were looked at
    looked: int = 0
    without: int = 0  # images for which the layer has no caption of its own

    @property
    def name(self) -> str:
        if self.layer is None:
            return ORIGINAL
        return self.layer if self.slot == DEFAULT_SLOT else f"{self.layer}.{self.slot}"

    def texts(self, storage: Storage, shard: str, table: pa.Table) -> dict[str, str]:
        """Key → caption of a shard, of whose table key, sha256 and caption are given. Counts flags."""
        originals = dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
        if self.layer is None:
            found = {key: text for key, text in originals.items() if text}
            flags = [linter.lint(text, "given").flags for text in originals.values()]
        else:
            rows = store.rows_of_shard(storage, self.layer, shard, table)
            flags = [tuple(row["flags"]) for row in rows.to_pylist() if row["slot"] == self.slot]
            found = {key: texts[self.slot] for key, texts in store.texts_of(rows).items() if self.slot in texts}
        self.looked += len(flags)
        self.without += len(originals.keys() - found.keys())
        self.flags.update(flag for these in flags for flag in these)
        return found


def side_of(storage: Storage, name: str, slot: str) -> Side:
    """`original`, a layer's id or `latest`, or one of these with a slot: LAYER:SLOT. Raises RecipeError."""
    name, _, own = name.partition(":")
    if name == ORIGINAL:
        return Side(None, "")
    layer, slot = store.find_layer(storage, name), own or slot
    slots = store.layer_recipe(storage, layer)["slots"]
    if slot not in slots:
        raise RecipeError("--slot", f"layer {layer} has no slot {slot!r}", f"name one of {', '.join(slots)}")
    return Side(layer, slot)


@dataclass
class Sampled:
    """Images that both sides have captions for."""

    jpegs: list[bytes] = field(default_factory=list)
    texts: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))


def compare(
    storage: Storage, a: str, b: str, *, slot: str = DEFAULT_SLOT, clip: Clip, sample: int = 1000
) -> dict[str, Any]:
    """Publish the comparison; gives its numbers and where it lies.

    An image that is in the dataset several times counts once; one for which a side has no caption of its own is
    counted as `without`, and is left out of the scores. Raises RecipeError where less than two are left.
    """
    dataset = Dataset(storage)
    sides = side_of(storage, a, slot), side_of(storage, b, slot)
    if sides[0].name == sides[1].name:
        raise RecipeError("B", f"is {sides[0].name}, as A is", "name two layers, or two slots as LAYER:SLOT")
    sampled, images = Sampled(), list[Embeddings]()
    for jpegs, texts in _sample(dataset, sides, sample):
        sampled.jpegs += jpegs
        for all_texts, some in zip(sampled.texts, texts, strict=True):
            all_texts += some
        images.append(clip.images(jpegs))
    if len(sampled.jpegs) < 2:
        raise RecipeError("A", "less than two images have captions of A and of B", "complete both layers first")
    seen = np.concatenate(images)
    near = metrics.neighbours(seen, min(NEIGHBOURS, len(seen) - 1))
    judged = [_judge(clip, seen, near, texts) for texts in sampled.texts]
    result = _result(sides, sampled, judged, near.shape[1], clip.name)
    return result | _publish(storage, sides, sampled, judged, result)


def _sample(
    dataset: Dataset, sides: tuple[Side, Side], count: int
) -> Iterator[tuple[list[bytes], tuple[list[str], list[str]]]]:
    """JPEGs and both sides' captions, shard by shard."""
    seen = set[str]()
    for shard in dataset.shard_names:
        layers = [side.layer for side in sides if side.layer is not None]
        if not all(store.is_captioned(dataset.storage, layer, shard) for layer in layers):
            continue
        table = dataset.table(shard, ["key", "sha256", "caption"])
        first, second = (side.texts(dataset.storage, shard, table) for side in sides)
        rows = []
        for row, (key, sha256) in enumerate(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True)):
            if key in first and key in second and sha256 not in seen and len(seen) < count:
                seen.add(sha256)
                rows.append(row)
        if rows:
            keys, jpegs = zip(*dataset.read_images(shard, rows), strict=True)
            yield list(jpegs), ([first[key] for key in keys], [second[key] for key in keys])
        if len(seen) >= count:
            return


@dataclass(frozen=True)
class Judged:
    """How one side's captions fit their images."""

    mean: metrics.Floats  # [images], CLIP score of the chunks
    least: metrics.Floats
    recall: float


def _judge(clip: Clip, images: Embeddings, near: Any, texts: Sequence[str]) -> Judged:
    parts = [metrics.chunks(text, clip.fits) for text in texts]
    owner = np.repeat(np.arange(len(texts)), [len(some) for some in parts])
    embedded = clip.texts([part for some in parts for part in some])
    mean, least = metrics.scores(images, embedded, owner)
    return Judged(mean, least, metrics.recall(images, metrics.whole(embedded, owner, len(texts)), near))


def _result(
    sides: tuple[Side, Side], sampled: Sampled, judged: Sequence[Judged], neighbours: int, clip: str
) -> dict[str, Any]:
    first, second = judged
    return {
        "pictures": len(sampled.jpegs),
        "clip": clip,
        "a": _numbers(sides[0], sampled.texts[0], first),
        "b": _numbers(sides[1], sampled.texts[1], second),
        "a_wins_by_mean": metrics.wins(first.mean, second.mean),
        "a_wins_by_min": metrics.wins(first.least, second.least),
        "neighbours": neighbours,
        "recall_by_chance": round(1 / (1 + neighbours), 4),
    }


def _numbers(side: Side, texts: list[str], judged: Judged) -> dict[str, Any]:
    return {
        "name": side.name,
        "captions": side.looked,
        "without": side.without,
        "clip_mean": round(float(judged.mean.mean()), 3),
        "clip_min": round(float(judged.least.mean()), 3),
        "recall": round(judged.recall, 4),
        "words": metrics.lengths(texts),
        "openers": metrics.openers(texts),
        "style": metrics.style(texts),
        "flags": {flag: round(count / side.looked, 4) for flag, count in sorted(side.flags.items())},
    }


def _publish(
    storage: Storage, sides: tuple[Side, Side], sampled: Sampled, judged: Sequence[Judged], result: dict[str, Any]
) -> dict[str, str]:
    """Numbers, contact sheet and page; gives their addresses."""
    margin = judged[0].mean - judged[1].mean
    order = np.argsort(-margin, kind="stable").tolist()
    half = min(DISAGREEMENTS, len(order) // 2)
    shown = {sides[0].name: order[:half], sides[1].name: order[::-1][:half]}
    entries = {
        name: [
            contact_sheet.Entry(
                sampled.jpegs[i],
                {
                    f"{side.name} ({j.mean[i]:.1f}, min {j.least[i]:.1f})": texts[i]
                    for side, j, texts in zip(sides, judged, sampled.texts, strict=True)
                },
            )
            for i in places
        ]
        for name, places in shown.items()
    }
    stem = f"{store.ROOT}/diff-{sides[0].name}-{sides[1].name}"
    storage.write(f"{stem}.json", json.dumps(result, indent=1, ensure_ascii=False).encode() + b"\n")
    storage.write(f"{stem}.png", contact_sheet.draw(entries))
    storage.write(f"{stem}.html", contact_sheet.page_of(result, entries).encode())
    return {kind: f"{storage.url}/{stem}.{kind}" for kind in ("json", "png", "html")}
