"""Two caption layers → a comparison on a sample of the dataset's images

    captions/diff-A-B.json    the numbers
    captions/diff-A-B.html    a self-contained page
    captions/diff-A-B.png     the images on which the two differ most

Keys are hashes, so the first images in key order are a random sample. It is the same in every comparison.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.pipeline.units.by_halves import by_halves, model_errors
from capstan.recaption import store
from capstan.recaption.compare import contact_sheet, metrics
from capstan.recaption.compare.clip import Clip, Embeddings
from capstan.recaption.lint import linter

log = logging.getLogger(__name__)

ORIGINAL: Final = "original"
DEFAULT_SLOT: Final = "descriptive"
NEIGHBOURS: Final = 9
DISAGREEMENTS: Final = 8  # images shown per side


@dataclass
class Side:
    """One side of the comparison: a slot of a layer, or the original captions."""

    layer: str | None
    slot: str
    flags: Counter[str] = field(default_factory=Counter)  # over all captions read
    captions: int = 0
    without: int = 0  # images without a caption of the layer's own

    @property
    def name(self) -> str:
        if self.layer is None:
            return ORIGINAL
        return self.layer if self.slot == DEFAULT_SLOT else f"{self.layer}.{self.slot}"

    def texts(self, storage: Storage, shard: str, table: pa.Table) -> dict[str, str]:
        """Return key → caption for a shard; count flags. `table` has the shard's key, sha256 and caption."""
        originals = dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
        if self.layer is None:
            texts = {key: text for key, text in originals.items() if text}
            flags = [linter.lint(text, "given").flags for text in originals.values()]
        else:
            rows = store.rows_of_shard(storage, self.layer, shard, table)
            flags = [tuple(row["flags"]) for row in rows.to_pylist() if row["slot"] == self.slot]
            slots_of = store.texts_of(rows)
            texts = {key: slots[self.slot] for key, slots in slots_of.items() if self.slot in slots}
        self.captions += len(flags)
        self.without += len(originals.keys() - texts.keys())
        self.flags.update(flag for these in flags for flag in these)
        return texts


def side_of(storage: Storage, name: str, slot: str) -> Side:
    """Parse `original`, a layer's id or `latest`, the latter two optionally as LAYER:SLOT. Raises RecipeError."""
    name, _, own = name.partition(":")
    if name == ORIGINAL:
        return Side(None, "")
    layer, slot = store.find_layer(storage, name), own or slot
    slots = store.layer_recipe(storage, layer)["slots"]
    if slot not in slots:
        raise RecipeError("--slot", f"layer {layer} has no slot {slot!r}", f"use one of {', '.join(slots)}")
    return Side(layer, slot)


def sides_of(storage: Storage, a: str, b: str, slot: str = DEFAULT_SLOT) -> tuple[Side, Side]:
    """Return both sides of a comparison. Raises RecipeError if one does not exist, or both are the same."""
    Dataset(storage)
    sides = side_of(storage, a, slot), side_of(storage, b, slot)
    if sides[0].name == sides[1].name:
        raise RecipeError("B", f"{sides[0].name} is also A", "choose two layers, or two slots as LAYER:SLOT")
    return sides


@dataclass
class Sampled:
    """Sampled images with captions of both sides."""

    jpegs: list[bytes] = field(default_factory=list)
    texts: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    images: list[Embeddings] = field(default_factory=list)  # each [1, width]
    chunks: tuple[list[Embeddings], list[Embeddings]] = field(default_factory=lambda: ([], []))  # each [chunks, width]
    unscored: dict[str, str] = field(default_factory=dict)  # key → why the CLIP could not judge it

    def add(self, clip: Clip, keys: Sequence[str], jpegs: Sequence[bytes], texts: Sequence[Sequence[str]]) -> None:
        """Embed images and both sides' captions; leave out those on which the CLIP raises."""
        images, errors = _embedded(range(len(keys)), lambda places: clip.images([jpegs[place] for place in places]))
        embedded: list[dict[int, Embeddings]] = []
        for side in texts:
            chunks = [metrics.chunks(text, clip.fits) for text in side]
            found, bad = _embedded(images, functools.partial(_texts, clip, chunks), chunks)
            embedded.append(found)
            errors |= bad
        for place, why in sorted(errors.items()):
            log.warning("image %s is not judged: %s", keys[place], why)
            self.unscored[keys[place]] = why
        for place in sorted(images.keys() - errors.keys()):
            self.jpegs.append(jpegs[place])
            self.images.append(images[place])
            for number in range(len(texts)):
                self.texts[number].append(texts[number][place])
                self.chunks[number].append(embedded[number][place])


def _texts(clip: Clip, chunks: Sequence[Sequence[str]], places: Sequence[int]) -> Embeddings:
    return clip.texts([chunk for place in places for chunk in chunks[place]])


def _embedded(
    places: Iterable[int], embed: Callable[[Sequence[int]], Embeddings], chunks: Sequence[Sequence[str]] | None = None
) -> tuple[dict[int, Embeddings], dict[int, str]]:
    """Return place → its embeddings (one, or one for each of its chunks), and place → why there are none."""
    found, errors = by_halves(list(places), embed)
    rows: dict[int, Embeddings] = {}
    for part, embeddings in found:
        stops = np.cumsum([1 if chunks is None else len(chunks[place]) for place in part])
        rows |= dict(zip(part, np.split(embeddings, stops[:-1]), strict=True))
    return rows, model_errors(errors)


def compare(
    storage: Storage, a: str, b: str, *, slot: str = DEFAULT_SLOT, clip: Clip, sample: int = 1000
) -> dict[str, Any]:
    """Publish the comparison; return its numbers and the URLs of its files.

    An image that occurs several times in the dataset counts once. If a side has no caption of its own for an image,
    the image counts as `without` and is not scored. Raises RecipeError if fewer than two images are left.
    """
    dataset = Dataset(storage)
    sides = sides_of(storage, a, b, slot)
    sampled = Sampled()
    for keys, jpegs, texts in _sample(dataset, sides, sample):
        sampled.add(clip, keys, jpegs, texts)
    if len(sampled.jpegs) < 2:
        raise RecipeError("A", "fewer than two images have captions of both A and B", "complete both layers first")
    embedded = np.concatenate(sampled.images)
    near = metrics.neighbours(embedded, min(NEIGHBOURS, len(embedded) - 1))
    judged = [_judge(embedded, near, chunks) for chunks in sampled.chunks]
    result = _result(sides, sampled, judged, near.shape[1], clip.name)
    return result | _publish(storage, sides, sampled, judged, result)


def _sample(
    dataset: Dataset, sides: tuple[Side, Side], count: int
) -> Iterator[tuple[list[str], list[bytes], tuple[list[str], list[str]]]]:
    """Yield keys, JPEGs and both sides' captions, shard by shard."""
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
            yield list(keys), list(jpegs), ([first[key] for key in keys], [second[key] for key in keys])
        if len(seen) >= count:
            return


@dataclass(frozen=True)
class Judged:
    """Scores of one side's captions."""

    mean: metrics.Floats  # [images], mean CLIP score of a caption's chunks
    least: metrics.Floats
    recall: float


def _judge(images: Embeddings, near: Any, chunks: Sequence[Embeddings]) -> Judged:
    owner, embedded = np.repeat(np.arange(len(chunks)), [len(some) for some in chunks]), np.concatenate(chunks)
    mean, least = metrics.scores(images, embedded, owner)
    return Judged(mean, least, metrics.recall(images, metrics.whole(embedded, owner, len(chunks)), near))


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
        **({"unscored": sampled.unscored} if sampled.unscored else {}),
    }


def _numbers(side: Side, texts: list[str], judged: Judged) -> dict[str, Any]:
    return {
        "name": side.name,
        "captions": side.captions,
        "without": side.without,
        "clip_mean": round(float(judged.mean.mean()), 3),
        "clip_min": round(float(judged.least.mean()), 3),
        "recall": round(judged.recall, 4),
        "words": metrics.lengths(texts),
        "openers": metrics.openers(texts),
        "style": metrics.style(texts),
        "flags": {flag: round(count / side.captions, 4) for flag, count in sorted(side.flags.items())},
    }


def _publish(
    storage: Storage, sides: tuple[Side, Side], sampled: Sampled, judged: Sequence[Judged], result: dict[str, Any]
) -> dict[str, str]:
    """Write numbers, contact sheet and page; return their URLs."""
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
