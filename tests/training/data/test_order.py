"""The order is a pure function in which each sample comes once an epoch, with buckets of sizes and without."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from capstan.training.data.order import BucketOrder, Order, permutation, without_last


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_permutation_holds_every_number_once_and_depends_on_the_seed_alone(count: int) -> None:
    assert sorted(permutation(count, 3)) == list(range(count))
    assert (permutation(count, 3) == permutation(count, 3)).all()
    assert count < 3 or (permutation(count, 3) != permutation(count, 4)).any()


def test_permutation_is_the_same_for_ever() -> None:
    assert permutation(8, 1).tolist() == [4, 3, 7, 0, 1, 5, 6, 2]


def test_permutation_is_spread_evenly() -> None:
    places = np.array([np.argsort(permutation(50, seed))[7] for seed in range(2000)])
    assert abs(places.mean() - 24.5) < 1.5
    assert len(set(places)) == 50


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_every_sample_comes_once_an_epoch(block: int) -> None:
    counts = [5, 1, 7, 3, 4]
    order = Order(counts, block, seed=1)
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    epochs = [[order(number) for number in range(20 * e, 20 * e + 20)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {place[0] for place in epoch} == {number}
        assert {place[1:] for place in epoch} == everything
    assert [place[1:] for place in epochs[0]] != [place[1:] for place in epochs[1]]


def test_reads_stay_within_a_block_of_shards() -> None:
    order = Order([100] * 12, 3, seed=1)
    for window in range(4):
        assert len({order(300 * window + i)[1] for i in range(300)}) == 3


def test_a_place_late_in_a_large_epoch_is_found_at_once() -> None:
    order = Order([10_000] * 1000, 8, seed=0)
    assert order(9_999_999)[0] == 0


def in_buckets(counts: list[int], block: int, batch: int, kinds: int = 3) -> tuple[BucketOrder, list[np.ndarray]]:
    """An order over shards whose rows lie in random buckets, the last of which is rare."""
    random = np.random.default_rng(0)
    share = [*[1.0 / (kinds - 1)] * (kinds - 1), 0.04]
    buckets = [random.choice(kinds, count, p=np.array(share) / sum(share)) for count in counts]
    return BucketOrder(Order(counts, block, seed=1), buckets, kinds, batch), buckets


@pytest.mark.parametrize(("block", "batch"), [(1, 4), (2, 8), (3, 8), (100, 16), (2, 64)])
def test_every_batch_is_of_one_bucket_and_every_sample_comes_once_an_epoch(block: int, batch: int) -> None:
    counts = [50, 10, 70, 30, 40]
    order, buckets = in_buckets(counts, block, batch)
    places = [order(number) for number in range(batch * (5 * 200 // batch))]
    for start in range(0, len(places), batch):
        assert len({int(buckets[place.shard][place.row]) for place in places[start : start + batch]}) == 1
    seen = Counter(places)
    assert set(seen.values()) == {1}
    totals = np.bincount(np.concatenate(buckets))
    full = {(s, row) for s, bucket in enumerate(buckets) for row in range(len(bucket)) if totals[bucket[row]] >= batch}
    for epoch in range(3):  # of those that wait for their bucket's next batch, none waits for more than an epoch
        assert full <= {place[1:] for place in seen if place.epoch == epoch}
    assert batch > 8 or len(full) == 200
    assert [place[1:] for place in places[:100]] != [place[1:] for place in places[200:300]]


def test_a_bucket_smaller_than_a_batch_waits_for_its_next_epochs() -> None:
    buckets = [np.array([0] * 30 + [1] * 2)]
    order = BucketOrder(Order([32], 1, seed=0), buckets, 2, 4)
    rare = [place for place in map(order, range(320)) if place.row >= 30]
    assert [place.epoch for place in rare] == [epoch for epoch in range(10) for _ in range(2)]


def test_batches_of_a_window_come_in_random_order_and_from_its_shards() -> None:
    counts = [1000] * 12
    order, buckets = in_buckets(counts, 3, 20)
    firsts = [order(20 * batch) for batch in range(590)]
    kinds = [int(buckets[place.shard][place.row]) for place in firsts]
    assert sum(a != b for a, b in pairwise(kinds)) > 200  # as good as chance, where two large buckets take turns
    windows = [order.window_of(20 * batch) for batch in range(590)]
    assert windows == sorted(windows)
    assert len(set(windows)) == 4
    shards = [order.shards_of(window) for window in windows]
    stray = sum(place.shard not in near for place, near in zip(firsts, shards, strict=True))
    assert stray <= 9  # carried from the window before: at most a batch of each bucket


def test_the_order_of_buckets_finds_a_late_place_at_once() -> None:
    order, _ = in_buckets([10_000] * 100, 8, 256)
    assert order(256 * 10_000_000).epoch in (2559, 2560)  # of a sample that was carried, or not


def test_held_out_samples_are_the_last() -> None:
    assert without_last([5, 3, 4], 6) == [5, 1]
    assert without_last([5, 3, 4], 0) == [5, 3, 4]
