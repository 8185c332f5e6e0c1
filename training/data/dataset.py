"""A dataset → samples, in an order that is a function of the seed

    number (0, 1, 2, …) ──Order──▶ (epoch, shard, row) ──TrainingData──▶ Sample ──Loader──▶ batch of tensors

The state of a run is one integer: step s with batches of B reads the samples s·B … s·B + B − 1 of one endless sequence,
and each worker takes its slice. So a run can stop at any step and resume with any number of workers.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.training.config import ORIGINAL, Data
from capstan.training.data.bad_samples import Location
from capstan.training.data.buckets import Size, assign, assign_by_cell, bucket_counts, shapes, sizes_of
from capstan.training.data.lanes import LaneBucketOrder, LaneOrder
from capstan.training.data.order import BucketOrder, Order, Place, hash64, without_last
from capstan.training.data.shard_cache import ShardCache
from capstan.training.data.shard_reader import JPG, NUMBERS, TARS, OpenShard, OpenShards, ShardRows, check_parts
from capstan.training.family import Sample

logger = logging.getLogger(__name__)


class AnyOrder(Protocol):
    """A sequence of places (`order`, `lanes`), read in windows of shards."""

    total: int

    def __call__(self, number: int, /) -> Place: ...
    def window_of(self, number: int, /) -> Any: ...
    def after(self, window: Any, /) -> Any: ...
    def shards_of(self, window: Any, /) -> np.ndarray: ...


class TrainingData:
    """Samples by number (in training order) or by index (in dataset order, held-out samples last).

    `layer` is a caption layer's id, or None for the original captions. `latents` returns a shard's latents in tar
    order, which replace the images; `states` returns the text encoders' states of its captions. `files` are the files
    that `cache` prefetches. `parts` are the suffixes of the samples' files that are read. `batch` is the size of a
    step's batch, required with aspect-ratio buckets and with several `lanes` (training.data.lanes; one lane is the
    order of earlier versions). `world` is the number of workers, each of which reads its share of the lanes.
    Thread-safe.
    """

    def __init__(
        self,
        dataset: Dataset,
        data: Data,
        seed: int,
        *,
        layer: str | None,
        latents: Callable[[str], ShardRows] | None = None,
        states: Callable[[str], Mapping[str, ShardRows]] | None = None,
        cache: ShardCache | None = None,
        files: Sequence[str] = (TARS,),
        parts: Sequence[str] = (JPG,),
        batch: int | None = None,
        order_seed: int | None = None,
        lanes: int = 1,
        world: int = 1,
    ) -> None:
        self.dataset, self.seed, self.layer = dataset, seed, layer
        self.weights = data.weights if layer is not None else {ORIGINAL: 1.0}
        counts = [entry.samples for entry in dataset.manifest.shards]
        self.total = sum(counts)
        if self.total <= data.holdout:
            where, hint = dataset.storage.url, "build a larger dataset, or hold out fewer samples"
            raise RecipeError("train.data.holdout", f"leaves no samples of {where} ({self.total} in all)", hint)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        counts = without_last(counts, data.holdout)
        self.lanes, self._counts = lanes, counts
        self._sizes = [] if data.buckets is None else sizes_of(data.buckets)
        # Latents have the shape of the bucket that `assign` finds, so its buckets are needed, from all tables.
        self._by_cell = lanes > 1 and latents is None
        self._read = [] if not self._sizes or self._by_cell else self._read_buckets()
        block = data.block if lanes == 1 else max(1, data.block // lanes)
        # Shards of one window, on this worker and on this machine.
        own = min(lanes, -(-lanes // world) + (lanes % world > 0)) * block
        near = min(lanes * block, own * int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        self._cache, self._seen = cache, set[tuple[int, ...]]()
        self._two_fit = cache is not None and (TARS not in files or cache.fits(dataset, 2 * near))
        check_parts(dataset, parts)
        self._parts = () if latents is not None else tuple(parts)  # stored latents take their place
        keep = 2 * own + 2
        self._open = OpenShards(
            dataset, layer, keep, latents=latents, states=states, cache=cache, files=files, parts=self._parts
        )
        self._buckets = lru_cache(maxsize=keep)(self._buckets_in)
        self.order = self._make_order(block, seed if order_seed is None else order_seed, batch)

    def _make_order(self, block: int, seed: int, batch: int | None) -> AnyOrder:
        kinds, lanes = len(self._sizes), self.lanes
        if not kinds and lanes == 1:
            return Order(self._counts, block, seed)
        assert batch is not None, "buckets and lanes need to know the batch"
        if not kinds:
            return LaneOrder(np.array(self._counts), lanes, block, seed, batch)
        if self._by_cell:
            counts = bucket_counts(self.dataset, self._counts, self._sizes)
        else:
            trained = [buckets[:count] for buckets, count in zip(self._read, self._counts, strict=False)]
            counts = np.stack([np.bincount(buckets, minlength=kinds) for buckets in trained])
        _warn_of_rare(self._sizes, counts.sum(0), batch)
        if lanes == 1:
            return BucketOrder(Order(self._counts, block, seed), trained, kinds, batch)
        return LaneBucketOrder(counts, lanes, block, seed, batch, self._buckets)

    def _read_buckets(self) -> list[np.ndarray]:
        """Return the bucket of each sample, shard by shard, from the shards' tables."""
        return [assign(*sides, self._sizes) for sides in shapes(self.dataset, self.dataset.shard_names)]

    def _buckets_in(self, number: int) -> np.ndarray:
        """Return the bucket of each of a shard's samples, also of those that are held out."""
        if not self._by_cell:
            return self._read[number]
        numbers = self._open[number].numbers
        return assign_by_cell(numbers[:, 0], numbers[:, 1], self._sizes)

    def __len__(self) -> int:
        """Return the number of training samples in an epoch."""
        return self.order.total

    def identity(self) -> dict[str, Any]:
        """Return what determines the samples; stored in checkpoints to detect a changed dataset."""
        digest = hashlib.blake2b(digest_size=8)
        for entry in self.dataset.manifest.shards:
            digest.update(entry.sha256.encode())
        facts = {"samples": len(self), "shards": digest.hexdigest(), "layer": self.layer}
        return facts if self.lanes == 1 else {**facts, "lanes": self.lanes}

    def progress(self, number: int) -> dict[str, float]:
        """Return values for the log after `number` samples."""
        return {"epoch": number / len(self)}

    def at(self, number: int) -> Sample:
        """Return sample `number` of the endless training sequence."""
        if self._cache is not None:
            self._prefetch(number)
        epoch, shard, row = self.order(number)
        return self._sample(shard, row, epoch)

    def locate(self, number: int) -> Location:
        """Return where sample `number` of the training sequence is stored."""
        _, shard, row = self.order(number)
        name = self.dataset.manifest.shards[shard].name
        return Location(self.dataset.storage.url, name, row, self._open[shard].text["key"][row].as_py())

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Return sample `index` in dataset order (held-out samples from `len(self)` on), caption of `epoch`."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sample(shard, index - int(self._starts[shard]), epoch)

    def captions(self) -> Iterator[str]:
        """Yield every caption that the blend may use, in dataset order."""
        for number in range(len(self.dataset.manifest.shards)):
            shard = self._open[number]
            texts = {**shard.captions, ORIGINAL: shard.text["caption"]}
            slots = [texts[slot].to_pylist() for slot in self.weights if slot in texts]
            yield from (text for row in zip(*slots, strict=True) for text in row if text is not None)

    def _prefetch(self, number: int) -> None:
        """Prefetch the shards of this window and of the next into the cache."""
        window = self.order.window_of(number)
        if window not in self._seen:
            self._seen = {window} if len(self._seen) > 8 * self.lanes else self._seen | {window}
            for near in (window, self.order.after(window)) if self._two_fit else (window,):
                for shard in self.order.shards_of(near):
                    self._open.prefetch(int(shard))

    def _sample(self, number: int, row: int, epoch: int) -> Sample:
        shard = self._open[number]
        key, extra = shard.text["key"][row].as_py(), shard.text["extra"][row].as_py()
        slot, text = self._caption(shard, key, row, epoch)
        latent = None if shard.latents is None else np.asarray(shard.latents[row])
        states = None if shard.states is None else _states(shard.states, slot, row)
        files = {part: self._open.file(number, shard, row, part) for part in self._parts}
        return Sample(
            key=key,
            jpeg=files.pop(JPG, b""),
            parts={part: data for part, data in files.items() if data},
            text=text,
            slot=slot,
            epoch=epoch,
            seed=hash64(self.seed, "sample", key, epoch) >> 1,
            extra=extra,
            latent=latent,
            states=states,
            bucket=self._sizes[self._buckets(number)[row]] if self._sizes else None,
            **dict(zip(NUMBERS, shard.numbers[row].tolist(), strict=False)),
        )

    def _caption(self, shard: OpenShard, key: str, row: int, epoch: int) -> tuple[str, str]:
        """Return (slot, text) drawn by (seed, key, epoch); the original if the layer has no such slot for this key."""
        draw, slot = hash64(self.seed, "caption", key, epoch) / 2**64, ORIGINAL
        for slot, weight in self.weights.items():  # noqa: B007 - rounding may leave the last slot
            draw -= weight
            if draw < 0:
                break
        text = shard.captions[slot][row].as_py() if slot in shard.captions and slot != ORIGINAL else None
        return (ORIGINAL, shard.text["caption"][row].as_py()) if text is None else (slot, text)


def _warn_of_rare(sizes: list[Size], samples: np.ndarray, batch: int) -> None:
    rare = [(size, count) for size, count in zip(sizes, samples.tolist(), strict=True) if 0 < count < batch]
    if rare:
        listing = ", ".join(f"{width} × {height}: {count}" for (width, height), count in rare)
        logger.warning(
            "some buckets have fewer samples than a batch, so they fill one only every few epochs (%s). Fix: set fewer "
            "sizes or a smaller ratio in train.data.buckets",
            listing,
        )


def _states(states: Mapping[str, ShardRows], slot: str, row: int) -> dict[str, np.ndarray]:
    """Return name → array of one sample, for the slot drawn for it (stored as SLOT.NAME)."""
    start = f"{slot}."
    return {name.removeprefix(start): np.asarray(rows[row]) for name, rows in states.items() if name.startswith(start)}
