"""Pairs of rows that are no duplicates of each other, as the search for duplicates asks about them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.select.arrays.apart import NOTHING, Apart

PAIRS = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2, unique=True), max_size=6)


@settings(max_examples=50, deadline=None)
@given(pairs=PAIRS, rows=st.lists(st.integers(0, 9), unique=True))
def test_a_part_of_the_rows_has_the_pairs_among_them(pairs: list[list[int]], rows: list[int]) -> None:
    apart = Apart.of(10, np.array(pairs, np.int64).reshape(-1, 2))
    part = apart.take(np.array(rows, np.int64))
    told = {frozenset(pair) for pair in pairs}
    assert {frozenset(pair) for pair in apart.pairs.tolist()} == told
    assert {frozenset(rows[place] for place in pair) for pair in part.pairs.tolist()} == {
        pair for pair in told if pair <= set(rows)
    }
    a, b = np.divmod(np.arange(100), 10)
    assert apart.has(a, b).tolist() == [frozenset((x, y)) in told for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def test_no_pairs_are_a_pair_of_nothing() -> None:
    assert NOTHING.take(np.arange(3)).has(np.array([0]), np.array([1])).tolist() == [False]
    assert NOTHING.rows.tolist() == []
