"""Lanes: the order of the samples for many nodes, in which a node reads only its own shards

    LaneOrder         number → (epoch, shard, row)
    LaneBucketOrder   the same in batches, each of one bucket of image sizes

A fixed permutation of the shards is cut into `lanes` parts of equal numbers of samples. Every batch takes the same
number of samples from each lane, lane after lane, so that a worker's slice of a batch comes from its own lanes if the
number of workers divides that of the lanes. With any number of workers the sequence is the same. As in
`training.data.order`, each sample comes once per epoch, and the cost of finding a place does not depend on the number.

In each epoch a lane permutes its shards, cuts them into windows of `block` shards, and permutes the samples of a window
(MosaicML's Streaming divides shards among canonical nodes in a similar way). A shard on the border of two lanes is read
by both: an epoch on n nodes reads at most n − 1 shards twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from capstan.training.config import TrainConfig
from capstan.training.data.order import Place, hash64, permutation, scrambled

_MIXED = 8  # samples of each lane in a batch of several datasets, at least


class LaneWindow(NamedTuple):
    """`block` shards of a lane in an epoch; the last window may have fewer."""

    epoch: int
    lane: int
    number: int


class _Lane(NamedTuple):
    """A lane in an epoch: its shards in order, and which of each shard's samples are the lane's."""

    start: int  # position in the lane, over all epochs, of its first sample in this epoch
    shards: np.ndarray  # int32 [shards]
    firsts: np.ndarray  # int32 [shards]: the lane's first sample of the shard
    counts: np.ndarray  # int32 [shards]: number of the lane's samples of the shard
    windows: np.ndarray  # int64 [windows]: number of samples before each window


class Lanes:
    """Samples of one kind: number → (epoch, shard, nth of its kind in the shard).

    `counts` are the shards' numbers of samples of the kind (int64 [shards]). Number n belongs to lane n mod `lanes`.
    Epoch e has the numbers from e · total on, so that in each epoch a lane has total / lanes samples, give or take one.
    """

    def __init__(self, counts: np.ndarray, lanes: int, block: int, seed: int, shards: np.ndarray | None = None) -> None:
        """Take `sequence(len(counts), seed)` as `shards` if it is known already."""
        self.lanes, self.block, self.seed, self.total = lanes, block, seed, int(counts.sum())
        self._shards = sequence(len(counts), seed) if shards is None else shards
        self._ends = np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64)[self._shards])])
        self._lane = lru_cache(maxsize=2 * lanes)(self._lay_out)
        self._members = lru_cache(maxsize=2 * lanes)(self._permute)

    def __call__(self, number: int) -> Place:
        window, place = self._find(number)
        shards, nths = self._members(window)
        return Place(window.epoch, int(shards[place]), int(nths[place]))

    def window_of(self, number: int) -> LaneWindow:
        """Return the window in which `number` is read."""
        return self._find(number)[0]

    def after(self, window: LaneWindow) -> LaneWindow:
        """Return the window that the lane reads next."""
        epoch, lane, number = window
        last = number + 1 >= len(self._lane(epoch, lane).windows)
        return LaneWindow(epoch + 1, lane, 0) if last else LaneWindow(epoch, lane, number + 1)

    def shards_of(self, window: LaneWindow) -> np.ndarray:
        """Return the window's shards (int32 [at most block])."""
        start = window.number * self.block
        return self._lane(window.epoch, window.lane).shards[start : start + self.block]

    def _find(self, number: int) -> tuple[LaneWindow, int]:
        """Return the window of a number, and its place there."""
        epoch, lane = number // self.total, number % self.lanes
        found = self._lane(epoch, lane)
        position = number // self.lanes - found.start
        window = int(found.windows.searchsorted(position, side="right")) - 1
        return LaneWindow(epoch, lane, window), position - int(found.windows[window])

    def _before(self, number: int, lane: int) -> int:
        """Return how many of the first `number` numbers belong to lanes below `lane`."""
        rounds, rest = divmod(number, self.lanes)
        return rounds * lane + min(rest, lane)

    def _lay_out(self, epoch: int, lane: int) -> _Lane:
        first, last = epoch * self.total, (epoch + 1) * self.total
        # Samples are ranked in the fixed sequence of the shards; the lane has those of ranks [start, stop).
        start, stop = (self._before(last, bound) - self._before(first, bound) for bound in (lane, lane + 1))
        low = int(np.searchsorted(self._ends, start, side="right")) - 1
        high = max(int(np.searchsorted(self._ends, stop, side="left")), low + 1)
        shards, ends = self._shards[low:high], self._ends[low : high + 1]
        firsts = np.maximum(start - ends[:-1], 0)
        counts = np.maximum(np.minimum(stop - ends[:-1], np.diff(ends)) - firsts, 0)
        # A shard's key is its own, whatever the lane and the kind, so that all kinds read shards in the same order.
        order = np.argsort(scrambled(shards, hash64(self.seed, "lane", epoch)), kind="stable")
        windows = np.concatenate([[0], np.cumsum(counts[order])])[:-1][:: self.block]
        shards, firsts, counts = (values[order].astype(np.int32) for values in (shards, firsts, counts))
        return _Lane(-(-(first - lane) // self.lanes), shards, firsts, counts, windows)

    def _permute(self, window: LaneWindow) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and nth of each of the window's samples, in order (int32 [samples] each)."""
        lane = self._lane(window.epoch, window.lane)
        here = slice(window.number * self.block, (window.number + 1) * self.block)
        counts = lane.counts[here]
        starts = np.cumsum(counts) - counts
        nths = np.arange(int(counts.sum()), dtype=np.int32) - np.repeat(starts - lane.firsts[here], counts)
        order = permutation(len(nths), hash64(self.seed, "window", *window))
        return np.repeat(lane.shards[here], counts)[order], nths[order].astype(np.int32)


def sequence(shards: int, seed: int) -> np.ndarray:
    """Return the fixed permutation of the shards that is cut into lanes (int64 [shards])."""
    return permutation(shards, hash64(seed, "lanes"))


class LaneOrder:
    """number → place. Each batch of `batch` numbers has batch / lanes samples of lane 0, then of lane 1, and so on."""

    def __init__(self, counts: np.ndarray, lanes: int, block: int, seed: int, batch: int) -> None:
        self.samples, self.batch, self.columns = Lanes(counts, lanes, block, seed), batch, batch // lanes
        self.lanes, self.total = lanes, self.samples.total

    def __call__(self, number: int) -> Place:
        return self.samples(in_lanes(number, self.batch, self.columns, self.lanes))

    def window_of(self, number: int) -> LaneWindow:
        """Return the window in which `number` is read."""
        return self.samples.window_of(in_lanes(number, self.batch, self.columns, self.lanes))

    def after(self, window: LaneWindow) -> LaneWindow:
        return self.samples.after(window)

    def shards_of(self, window: LaneWindow) -> np.ndarray:
        return self.samples.shards_of(window)


def in_lanes(number: int, batch: int, columns: int, lanes: int) -> int:
    """Return the number, as `Lanes` counts, of the sample at `number` of a sequence of batches, lane after lane.

    >>> [in_lanes(number, 6, 2, 3) for number in range(12)]
    [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    """
    step, row = divmod(number, batch)
    lane, column = divmod(row, columns)
    return step * batch + column * lanes + lane


class LaneBucketOrder:
    """number → place, in batches of `batch` numbers: all samples of a batch are of one bucket, from all lanes.

    The samples of a bucket are `Lanes` of their own, cut into batches. An epoch is divided into as many slots as a lane
    has windows; a bucket has its share of batches in each slot, and the batches of a slot are permuted. No batch is
    short; samples that do not fill one wait for the next, which may be the next epoch's first. Of a rare bucket a lane
    has now more, now fewer than its share, so a few samples are read apart from the others of their shard.
    """

    def __init__(
        self, counts: np.ndarray, lanes: int, block: int, seed: int, batch: int, buckets: Callable[[int], np.ndarray]
    ) -> None:
        """Take the numbers of samples int64 [shards, kinds], and what returns the bucket of each of a shard's rows.

        Rows that follow those counted are held out.
        """
        self.lanes, self.batch, self.columns, self.seed = lanes, batch, batch // lanes, seed
        shards = sequence(len(counts), seed)
        self._kinds = [Lanes(kind, lanes, block, seed, shards) for kind in counts.T]
        self._all = Lanes(counts.sum(1), lanes, block, seed, shards)
        self.total, self._totals, self._samples = self._all.total, counts.sum(0), counts.sum(1)
        self._slots = max(1, -(-len(counts) // (lanes * block)))  # per epoch
        self._buckets = buckets
        self._batch = lru_cache(maxsize=64)(self._find)
        self._order = lru_cache(maxsize=8)(self._permute)
        self._rows = lru_cache(maxsize=2 * lanes * block + 16)(self._group)

    def __call__(self, number: int) -> Place:
        batch, row = divmod(number, self.batch)
        kind, nth = self._batch(batch)
        epoch, shard, nth = self._kinds[kind](in_lanes(nth * self.batch + row, self.batch, self.columns, self.lanes))
        return Place(epoch, shard, int(self._rows(shard)[kind][nth]))

    def window_of(self, number: int) -> LaneWindow:
        """Return the window that most samples are read in at `number`."""
        return self._all.window_of(in_lanes(number, self.batch, self.columns, self.lanes))

    def after(self, window: LaneWindow) -> LaneWindow:
        return self._all.after(window)

    def shards_of(self, window: LaneWindow) -> np.ndarray:
        return self._all.shards_of(window)

    def _ends(self, slot: int) -> np.ndarray:
        """Return the number of batches of each bucket that are complete before a slot, over all epochs."""
        epoch, part = divmod(slot, self._slots)
        return (self._totals * epoch + self._totals * part // self._slots) // self.batch

    def _find(self, batch: int) -> tuple[int, int]:
        """Return the batch's bucket, and its number among that bucket's batches."""
        # A bucket is behind its exact share by less than two batches, so the slot lies between two near bounds.
        low, high = ((batch + more) * self.batch * self._slots // self.total for more in (0, 2 * len(self._totals) + 1))
        slots = range(low, high + 2)
        slot = slots[bisect_left(slots, batch + 1, key=lambda slot: int(self._ends(slot).sum()))] - 1
        before, after = self._ends(slot), self._ends(slot + 1)
        place = int(self._order(slot)[batch - int(before.sum())])
        ends = np.cumsum(after - before)
        kind = int(np.searchsorted(ends, place, side="right"))
        return kind, int(after[kind]) - (int(ends[kind]) - place)

    def _permute(self, slot: int) -> np.ndarray:
        count = int((self._ends(slot + 1) - self._ends(slot)).sum())
        return permutation(count, hash64(self.seed, "batches", slot))

    def _group(self, shard: int) -> list[np.ndarray]:
        """Return the rows of each bucket in a shard."""
        buckets = self._buckets(shard)[: int(self._samples[shard])]
        ends = np.cumsum(np.bincount(buckets, minlength=len(self._totals)))
        return np.split(np.argsort(buckets, kind="stable").astype(np.int32), ends[:-1])


def lanes_of(train: TrainConfig) -> int:
    """Return the number of lanes of a new run.

    Without `train.data.lanes` it is the largest divisor of the batch that is at most `block` or the number of workers.
    Datasets without buckets are mixed a sample of each lane at a time, so then a batch has at least eight of these.
    """
    if train.data.lanes is not None:
        return train.data.lanes
    most = max(train.data.block, train.engine.most)
    if train.data.datasets is not None and train.data.buckets is None:
        most = min(most, train.batch // _MIXED)
    return divisor(train.batch, most)


def divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most `most`, and 1 if `most` is less.

    >>> divisor(64, 8), divisor(12, 8), divisor(7, 4), divisor(7, 0)
    (8, 6, 1, 1)
    """
    return max(lanes for lanes in range(1, max(1, most) + 1) if number % lanes == 0)
