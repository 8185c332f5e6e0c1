"""Rows in parts that fit: every row once, equal values together, and in order, however the values are distributed."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.select.arrays import large_arrays, partitions
from capstan.pipeline.select.arrays.partitions import ascending, first, parts, scattered

FIT = 8  # rows


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "PART_ROWS", FIT)
        patch.setattr(large_arrays, "_PIECE", 5)
        patch.setattr(large_arrays, "MAPPED_ROWS", 20)
        yield


# Values that crowd, and values that do not.
values = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)), max_size=120)


@settings(max_examples=60, deadline=None)
@given(listed=values)
def test_rows_with_equal_values_share_a_part(listed: list[int]) -> None:
    column, rows = np.array(listed, np.uint64), np.arange(len(listed))
    found = list(parts([column, rows]))
    assert sorted(row for part in found for row in part.columns[1].tolist()) == rows.tolist()
    seen = [set(part.columns[0].tolist()) for part in found]
    assert sum(map(len, seen)) == len(set(listed))
    for part, own in zip(found, seen, strict=True):
        assert (column[part.columns[1]] == part.columns[0]).all()
        assert (np.diff(part.columns[1]) > 0).all()
        assert len(own) == 1 if part.equal else len(part.columns[0]) <= FIT


@settings(max_examples=60, deadline=None)
@given(listed=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=120), most=st.integers(0, 130))
def test_rows_are_in_order_by_all_columns(listed: list[tuple[int, int]], most: int) -> None:
    columns = [np.array([pair[place] for pair in listed], np.int64) for place in (0, 1)]
    columns.append(np.arange(len(listed)))
    wanted = sorted(range(len(listed)), key=lambda row: (*listed[row], row))
    assert [row for rows in ascending(columns) for row in rows.tolist()] == wanted
    assert [row for rows in first(columns, most) for row in rows.tolist()] == wanted[:most]


def test_parts_of_different_values_fit_and_are_few() -> None:
    column = np.random.default_rng(0).integers(0, 2**64, 4000, dtype=np.uint64)
    sizes = [len(part.columns[0]) for part in parts([column])]
    assert max(sizes) <= FIT
    assert len(sizes) < 8 * 4000 / FIT


@pytest.mark.parametrize("rows", [np.arange(50), None])
def test_columns_are_scattered_together(rows: np.ndarray | None) -> None:
    numbers, wide = np.arange(50) * 7 % 4, np.arange(150, dtype=np.uint8).reshape(50, 3)
    found = scattered([rows, wide], lambda piece: numbers[piece].astype(np.uint16), 5)
    for number, (rows, own) in enumerate(found):
        assert rows.tolist() == np.flatnonzero(numbers == number).tolist()
        assert (own == wide[rows]).all()
