"""Blocks of rows by mask and prefix: what agrees is in one block, and how many blocks there are changes no outcome."""

import numpy as np
import pytest

from capstan.pipeline.image.phash import COLOUR_BYTES
from capstan.pipeline.select import hash_pairs
from capstan.pipeline.select.arrays import hash_blocks
from capstan.pipeline.select.arrays.hash_blocks import block_bits, blocks_of, in_threads
from capstan.pipeline.select.near_duplicates import find_duplicates, near_reference


def hashes(n: int) -> np.ndarray:
    """Random hashes, some near others, and many of one template."""
    rng = np.random.default_rng(n)
    made = rng.integers(0, 2**64, n, dtype=np.uint64)
    for share in (4, 3):
        made[::share] = made[rng.integers(0, n, len(made[::share]))] ^ np.uint64(1) << rng.integers(
            0, 64, len(made[::share])
        ).astype(np.uint64)
    made[: n // 5] = made[0] ^ rng.integers(0, 64, n // 5).astype(np.uint64)
    return made


@pytest.mark.parametrize("bits", [0, 3, 8])
def test_rows_that_agree_are_in_one_block(bits: int) -> None:
    found, mask = hashes(1000), 0xFFFF0000FF
    blocks = blocks_of(found, mask, bits)
    assert len(blocks) == 1 << bits
    assert np.sort(np.concatenate([rows for rows, _ in blocks])).tolist() == list(range(1000))
    place = np.empty(1000, int)
    for number, (rows, own) in enumerate(blocks):
        assert (own == found[rows]).all()
        assert (np.diff(rows) > 0).all()
        place[rows] = number
    masked = found & np.uint64(mask)
    for value in np.unique(masked):
        assert len(set(place[masked == value])) == 1


def test_more_rows_have_more_blocks_of_the_same_size() -> None:
    assert [block_bits(rows) for rows in (0, 20_000, 40_000, 1 << 20, 10**9)] == [0, 0, 1, 6, 15]


def test_results_come_in_order() -> None:
    assert list(in_threads(lambda number: number * number, 50)) == [number * number for number in range(50)]


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("coloured", [False, True])
def test_the_outcome_is_that_of_one_block(crowded: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    n, rng = 3000, np.random.default_rng(1)
    found = hashes(n)
    order, sums = rng.permutation(n), rng.integers(0, 2**64, (n, 4), dtype=np.uint64)
    colours = rng.integers(100, 104, (n, COLOUR_BYTES), dtype=np.uint8) if coloured else None
    reference = found[rng.integers(0, n, 200)] ^ np.uint64(3), None if colours is None else colours[:200]
    if crowded:  # pairs are too many to be listed: rows are split in halves
        monkeypatch.setattr(hash_pairs, "MAX_PAIRS", 500)
        monkeypatch.setattr(hash_pairs, "_FEW", 64)
    masks = hash_pairs._masks(1 << 20, 4)
    monkeypatch.setattr(hash_pairs, "_masks", lambda *_: masks)
    outcomes = []
    for rows in (1 << 14, 100, 32):
        monkeypatch.setattr(hash_blocks, "BLOCK_ROWS", rows)
        given = {"exact": True, "distance": 4, "colours": colours, "tolerance": 10}
        decided = find_duplicates(order, sums, found, **given)
        near = near_reference(reference, found, colours, 4, 10)
        outcomes.append((decided.kept.tolist(), decided.kind.tolist(), near.tolist()))
    assert outcomes[1:] == outcomes[:1] * 2
    assert 20 < sum(kept >= 0 for kept in outcomes[0][0]) < n
    assert 0 < sum(row >= 0 for row in outcomes[0][2]) < n
