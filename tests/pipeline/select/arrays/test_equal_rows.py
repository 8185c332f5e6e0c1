"""Equal rows: the first of each by precedence, also where they are compared in parts, and where hashes collide."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.select.arrays import equal_rows, large_arrays, partitions
from capstan.pipeline.select.arrays.equal_rows import first_equal


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (partitions, equal_rows):
            patch.setattr(module, "PART_ROWS", 8)
        patch.setattr(large_arrays, "_PIECE", 5)
        patch.setattr(large_arrays, "MAPPED_ROWS", 20)
        yield


@settings(max_examples=80, deadline=None)
@given(
    listed=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=120),
    seed=st.integers(0, 1000),
    collide=st.booleans(),
)
def test_the_first_of_equal_rows_is_found(listed: list[tuple[int, int]], seed: int, collide: bool) -> None:
    n, words = len(listed), np.array(listed, np.uint64).reshape(-1, 2)
    order = np.random.default_rng(seed).permutation(n)
    with pytest.MonkeyPatch.context() as patch:
        if collide:  # all values have one hash
            patch.setattr(equal_rows, "_mixed", lambda columns: np.zeros(len(columns[0]), np.uint64))
        found = first_equal(lambda rows: list(words[rows].T), order)
    wanted: dict[tuple[int, int], int] = {}
    for row in order.tolist():
        wanted.setdefault(listed[row], row)
    assert found.tolist() == [wanted[pair] for pair in listed]
