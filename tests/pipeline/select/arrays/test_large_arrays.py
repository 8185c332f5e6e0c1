"""Arrays of a value per row: filled in blocks, and large ones not in this process's own memory."""

import errno
import gc
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from capstan.pipeline.errors import DiskFull
from capstan.pipeline.select.arrays import large_arrays
from capstan.pipeline.select.arrays.large_arrays import LargeArrays, count, empty, joined, taken, tally, which


@pytest.mark.parametrize("mapped", [False, True])
def test_blocks_are_put_one_after_the_other(mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_arrays, "MAPPED_ROWS", 0 if mapped else 1 << 20)
    keys = np.array([bytes([number]) * 16 for number in range(1, 101)], "S16")
    colours, steps = np.arange(4800, dtype=np.uint8).reshape(100, 48), np.arange(100, dtype=np.int16)
    arrays = LargeArrays(100)
    for start in (0, 30, 60, 90):
        for name, values in (("key", keys), ("colours", colours), ("step", steps)):
            arrays.put(name, start, values[start : start + 30])
    for name, values in (("key", keys), ("colours", colours), ("step", steps)):
        whole = arrays.array(name, values[:0])
        assert whole.dtype == values.dtype
        assert (whole == values).all()
        assert isinstance(whole, np.memmap) == mapped


def test_files_are_gone_with_their_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_arrays, "MAPPED_ROWS", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arrays = LargeArrays(1000)
    arrays.put("key", 0, np.full(1000, b"x" * 16, "S16"))
    assert list(tmp_path.iterdir()) == []
    held = arrays.array("key", np.zeros(0, "S16"))
    del arrays
    gc.collect()
    assert held[999] == b"x" * 16
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del held
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_no_rows_are_like_those_of_a_block() -> None:
    assert LargeArrays(0).array("key", np.zeros(0, "S16")).dtype == "S16"


def test_all_rows_are_taken_as_they_are() -> None:
    values = np.arange(5)
    assert taken(values, np.arange(5)) is values


@pytest.mark.parametrize("mapped", [False, True])
def test_some_rows_are_copied_in_pieces(mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_arrays, "MAPPED_ROWS", 0 if mapped else 1 << 20)
    monkeypatch.setattr(large_arrays, "_PIECE", 7)
    values, rows = np.arange(4800, dtype=np.uint8).reshape(100, 48), np.arange(1, 100, 3)
    found = taken(values, rows)
    assert (found == values[rows]).all()
    assert isinstance(found, np.memmap) == mapped


def test_a_full_disk_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing to a file in memory whose disk is full would kill the process."""
    monkeypatch.setattr(large_arrays, "MAPPED_ROWS", 0)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFull):
        empty(100, np.int64)


@pytest.mark.parametrize("mapped", [False, True])
def test_rows_are_chosen_and_counted_in_pieces(mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_arrays, "MAPPED_ROWS", 10 if mapped else 1 << 20)
    monkeypatch.setattr(large_arrays, "_PIECE", 7)
    values = np.arange(100) % 3
    found = which(100, lambda piece: values[piece] == 2)
    assert found.tolist() == list(range(2, 100, 3))
    assert isinstance(found, np.memmap) == mapped
    assert count(100, lambda piece: values[piece] == 2) == 33
    assert tally(values) == {0: 34, 1: 33, 2: 33}
    assert joined([np.arange(4), np.arange(0), np.arange(9)], np.int64).tolist() == [*range(4), *range(9)]
    assert joined([], np.int64).tolist() == []
