"""Duplicates: exact pigeonholes against brute force, and who survives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dedup import close_pairs, find_duplicates, precedence


def rows(batch, area, sha256, phash, exact=True, distance=4):
    n = len(batch)
    order = precedence(np.array(batch), np.array(area), np.array([f"{i:02}" for i in range(n)], "S2"))
    found = find_duplicates(order, np.array(sha256, "S8"), np.array(phash, np.uint64), exact=exact, distance=distance)
    return found.kept.tolist(), found.exact.tolist()


def clustered(seed: int, n: int) -> np.ndarray:
    """Hashes of which many are a few bits apart."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**64, max(1, n // 5), dtype=np.uint64)
    hashes = base[rng.integers(0, len(base), n)]
    for _ in range(4):
        hashes ^= np.uint64(1) << rng.integers(0, 64, n, dtype=np.uint64) * rng.integers(0, 2, n, dtype=np.uint64)
    return hashes


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 60), distance=st.integers(0, 16))
def test_close_pairs_are_those_of_brute_force(seed: int, n: int, distance: int) -> None:
    hashes = np.unique(clustered(seed, n))
    wanted = [
        (i, j) for j in range(len(hashes)) for i in range(j) if int(hashes[i] ^ hashes[j]).bit_count() <= distance
    ]
    earlier, later = close_pairs(hashes, distance)
    assert list(zip(earlier.tolist(), later.tolist(), strict=True)) == wanted


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), distance=st.integers(0, 8))
def test_every_row_is_kept_or_close_to_a_kept_one(seed: int, n: int, distance: int) -> None:
    hashes = clustered(seed, n)
    kept, _ = rows([0] * n, [1] * n, [str(i) for i in range(n)], hashes, distance=distance)
    for i, target in enumerate(kept):
        near = [j for j in range(n) if j != i and kept[j] < 0 and int(hashes[i] ^ hashes[j]).bit_count() <= distance]
        assert (target in near) if target >= 0 else not near


def test_the_larger_picture_survives_then_the_smaller_key() -> None:
    assert rows([0, 0, 0], [10, 20, 20], ["a", "a", "a"], [0, 0, 0]) == ([1, -1, 1], [True, False, True])


def test_what_an_earlier_batch_holds_survives() -> None:
    kept, _ = rows([1, 0], [999, 1], ["a", "a"], [0, 0])
    assert kept == [1, -1]


def test_an_exact_duplicate_names_the_row_that_is_kept_in_the_end() -> None:
    kept, exact = rows([0, 0, 0], [30, 20, 10], ["a", "b", "b"], [0, 1, 1])
    assert (kept, exact) == ([-1, 0, 0], [False, False, True])


@pytest.mark.parametrize(("exact", "distance", "wanted"), [(False, None, [-1, -1]), (True, None, [-1, 0])])
def test_each_kind_can_be_left_out(exact, distance, wanted) -> None:
    assert rows([0, 0], [2, 1], ["a", "a"], [0, 0], exact=exact, distance=distance)[0] == wanted
