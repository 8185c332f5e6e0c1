"""The order of the samples: a pure function of (seed, number)

    Order         number → (epoch, shard, row)
    BucketOrder   the same in batches, each of one bucket of image sizes

The sequence is endless, and each sample comes once per epoch. An epoch permutes the shards, cuts them into windows of
`block` shards, and permutes the samples of a window, so that reads stay within a few shards. The cost of finding a
place does not depend on the number, so that a reader's whole state is one integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


def hash64(*parts: str | int) -> int:
    """Return a 64-bit hash of the parts, the same on every machine."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def permutation(count: int, seed: int) -> np.ndarray:
    """Return a permutation of 0 … count − 1 that depends only on `seed`, not on a library's version (int64 [count]).

    Sorts by SplitMix64 of a counter (Steele, Lea & Flood 2014).
    """
    return np.argsort(scrambled(np.arange(count), seed), kind="stable")


def scrambled(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Return SplitMix64's output for each of the counter's values `numbers` (uint64 [numbers])."""
    z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Place(NamedTuple):
    """The location of a sample."""

    epoch: int
    shard: int
    row: int


class Window(NamedTuple):
    """`block` shards of an epoch; the last window may have fewer."""

    epoch: int
    number: int


class Order:
    """number → place: every row once per epoch. `counts` are the shards' numbers of samples."""

    def __init__(self, counts: Sequence[int], block: int, seed: int) -> None:
        self.counts, self.block, self.seed = np.asarray(counts, dtype=np.int64), block, seed
        self.total = int(self.counts.sum())
        self.windows = -(-len(self.counts) // block)
        self._epoch = lru_cache(maxsize=4)(self._lay_out)
        self.members = lru_cache(maxsize=8)(self._permute)

    def __call__(self, number: int) -> Place:
        epoch, position = divmod(number, self.total)
        window = self.window_of(number)
        shards, rows = self.members(window)
        place = position - int(self._epoch(epoch)[1][window.number])
        return Place(epoch, int(shards[place]), int(rows[place]))

    def window_of(self, number: int) -> Window:
        """Return the window in which `number` is read."""
        epoch, position = divmod(number, self.total)
        return Window(epoch, int(np.searchsorted(self._epoch(epoch)[1], position, side="right")) - 1)

    def after(self, window: Window) -> Window:
        """Return the window that is read next."""
        last = window.number + 1 == self.windows
        return Window(window.epoch + 1, 0) if last else Window(window.epoch, window.number + 1)

    def shards_of(self, window: Window) -> np.ndarray:
        """Return the window's shards (int64 [at most block])."""
        return self._epoch(window.epoch)[0][window.number * self.block : (window.number + 1) * self.block]

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's shards in order, and the position at which each window starts."""
        shards = permutation(len(self.counts), hash64(self.seed, "shards", epoch))
        starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
        return shards, starts[:-1][:: self.block]

    def _permute(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and row of each of the window's samples, in order (int32 [samples] each)."""
        shards = self.shards_of(window)
        counts = self.counts[shards]
        starts = np.cumsum(counts) - counts
        rows = np.arange(int(counts.sum())) - np.repeat(starts, counts)
        order = permutation(len(rows), hash64(self.seed, "window", *window))
        return np.repeat(shards, counts)[order].astype(np.int32), rows[order].astype(np.int32)


class BucketOrder:
    """number → place, in batches of `batch` numbers: all samples of a batch are of one bucket.

    Each bucket is a stream: its samples in the sequence of `order`, epoch after epoch, cut into batches. A batch is
    read in the window that holds its last sample; the batches of a window are permuted. Samples left in a bucket at the
    end of a window or epoch are carried into its next batch: no batch is short, no sample is skipped or repeated within
    its epoch, and the samples of a rare bucket come when there is a batch of them.
    """

    def __init__(self, order: Order, buckets: Sequence[np.ndarray], kinds: int, batch: int) -> None:
        """`buckets` holds the bucket of each row, shard by shard (integers below `kinds`)."""
        self.order, self.batch, self.total = order, batch, order.total
        self._buckets = buckets
        self._counts = np.stack([np.bincount(shard, minlength=kinds) for shard in buckets])  # [shards, kinds]
        self._totals = self._counts.sum(0)
        self._find = lru_cache(maxsize=64)(self._look_up)
        self._window = lru_cache(maxsize=64)(self._window_at)
        self._before = lru_cache(maxsize=4)(self._count_before)
        self._ends = lru_cache(maxsize=4)(self._count_batches)
        self._batches = lru_cache(maxsize=8)(self._permute)
        self._members = lru_cache(maxsize=8)(self._group)

    def __call__(self, number: int) -> Place:
        batch, row = divmod(number, self.batch)
        bucket, first = self._find(batch)
        return self._at(bucket, first + row)

    def window_of(self, number: int) -> Window:
        """Return the window in which `number` is read, the one of the last sample of its batch."""
        return self._window(number // self.batch)

    def after(self, window: Window) -> Window:
        return self.order.after(window)

    def shards_of(self, window: Window) -> np.ndarray:
        return self.order.shards_of(window)

    def _look_up(self, batch: int) -> tuple[int, int]:
        """Return the batch's bucket, and the place of its first sample in the bucket's stream."""
        window = self._window(batch)
        before, after = self._ends(window.epoch)[window.number : window.number + 2]  # [kinds] each
        place = int(self._batches(window)[batch - int(before.sum())])
        ends = np.cumsum(after - before)
        bucket = int(np.searchsorted(ends, place, side="right"))
        nth = int(after[bucket]) - (int(ends[bucket]) - place)
        return bucket, nth * self.batch

    def _window_at(self, batch: int) -> Window:
        epoch = batch * self.batch // self.total  # the batch ends in this epoch, or in one a little later
        while int((self._totals * (epoch + 1) // self.batch).sum()) <= batch:
            epoch += 1
        ends = self._ends(epoch).sum(1)
        return Window(epoch, int(np.searchsorted(ends, batch, side="right")) - 1)

    def _at(self, bucket: int, place: int) -> Place:
        """Return the sample at `place` of a bucket's stream."""
        epoch, place = divmod(place, int(self._totals[bucket]))
        before = self._before(epoch)[:, bucket]
        window = Window(epoch, int(np.searchsorted(before, place, side="right")) - 1)
        shards, rows = self.order.members(window)
        member = self._members(window)[bucket][place - int(before[window.number])]
        return Place(epoch, int(shards[member]), int(rows[member]))

    def _count_before(self, epoch: int) -> np.ndarray:
        """Count samples of each bucket in the epoch before each window, and at its end: [windows + 1, kinds]."""
        shards = np.concatenate([self.order.shards_of(Window(epoch, n)) for n in range(self.order.windows)])
        sums = np.concatenate([np.zeros((1, len(self._totals)), np.int64), np.cumsum(self._counts[shards], axis=0)])
        return np.concatenate([sums[:-1][:: self.order.block], sums[-1:]])

    def _count_batches(self, epoch: int) -> np.ndarray:
        """Count batches of each bucket, over all epochs, complete before each window: [windows + 1, kinds]."""
        return (self._totals * epoch + self._before(epoch)) // self.batch

    def _permute(self, window: Window) -> np.ndarray:
        ends = self._ends(window.epoch).sum(1)
        count = int(ends[window.number + 1] - ends[window.number])
        return permutation(count, hash64(self.order.seed, "batches", *window))

    def _group(self, window: Window) -> list[np.ndarray]:
        """Return the window's samples of each bucket, by their place in the window's order."""
        shards, rows = self.order.members(window)
        kinds = np.empty(len(rows), np.int64)
        for shard in self.shards_of(window):
            here = shards == shard
            kinds[here] = self._buckets[shard][rows[here]]
        ends = np.cumsum(np.bincount(kinds, minlength=len(self._totals)))
        return np.split(np.argsort(kinds, kind="stable"), ends[:-1])


def without_last(counts: Sequence[int], held_out: int) -> list[int]:
    """Return `counts` without the last `held_out` samples and without empty shards at the end."""
    ends = np.minimum(np.cumsum(counts), sum(counts) - held_out)
    return [int(count) for count in np.diff(ends, prepend=0) if count > 0]
