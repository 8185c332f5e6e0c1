"""Selecting in parts: the outcome and the memory do not depend on how many rows there are, or how they are divided."""

import tracemalloc

import numpy as np
import pytest
from staged_rows import recipe, scored, stage

from capstan.pipeline.image.phash import COLOUR_BYTES
from capstan.pipeline.select import hash_pairs, near_duplicates
from capstan.pipeline.select.arrays import equal_rows, hash_blocks, large_arrays, partitions
from capstan.pipeline.select.decide import decide
from capstan.pipeline.select.near_duplicates import find_duplicates, precedence
from capstan.pipeline.storage import Storage


def in_parts(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Let parts have at most that many rows, and larger arrays be files."""
    for module in (partitions, equal_rows, near_duplicates):
        patch.setattr(module, "PART_ROWS", rows)
    patch.setattr(large_arrays, "MAPPED_ROWS", rows)
    patch.setattr(large_arrays, "_PIECE", max(3, rows // 2))


def test_decisions_are_equal_in_one_part_and_in_many(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    random, units = np.random.default_rng(0), []
    for number in range(4):
        rows = [
            {
                "url": f"http://{'a' if random.random() < 0.6 else random.integers(9)}/",
                "width": int(random.integers(5)),
                "original_width": int(random.integers(300, 310)),
                "sha256": f"{random.integers(60):064x}",
                "phash": int(random.integers(40)) << int(random.integers(50)),
                "reason": "timeout" if random.random() < 0.1 else "",
            }
            for _ in range(80)
        ]
        unit = stage(storage, f"{number // 2:04d}-{number:06d}", rows)
        scores = [None if random.random() < 0.1 else float(random.integers(4)) for _ in rows]
        units.append(scored(storage, unit, scores))
    steps = [
        {"name": "domains", "at_most": 70, "per": "domain", "by": "clip_score"},
        {"name": "even", "balance": "width > 2"},
        {"name": "best", "top": 0.9, "by": "clip_score"},
    ]
    asked = recipe(select=steps, score={"clip": {}}, dedup={"perceptual": 2, "colours": None}, shards={"samples": 20})
    found = []
    for rows in (1000, 320 // 32, 3):
        in_parts(monkeypatch, rows)
        decided = decide(asked, storage, units)
        listed = [decided.step, decided.shard, decided.repeats.kept, decided.repeats.kind]
        found.append(([values.tolist() for values in listed], decided.counts, decided.funnel))
    assert found[1:] == found[:1] * 2
    assert all(step["lost"] for step in found[0][2][1:])  # each step matters


@pytest.mark.parametrize("crowded", [False, True])
def test_memory_does_not_grow_with_the_rows(crowded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2000)
    monkeypatch.setattr(hash_blocks, "BLOCK_ROWS", 500)
    monkeypatch.setattr(hash_pairs, "MAX_PAIRS", 2000)
    monkeypatch.setattr(hash_pairs, "_CHUNK", 2000)
    peaks = []
    for rows in (20_000, 80_000):
        random = np.random.default_rng(0)
        made = [
            (np.uint64, (rows,)), (np.uint64, (rows, 4)), (np.int64, (rows,)), (np.int64, (rows,)),
            (np.uint8, (rows, COLOUR_BYTES)),
        ]  # fmt: skip
        phash, sums, batch, area, colours = (
            large_arrays.empty(rows, np.empty((0, *shape[1:]), dtype)) for dtype, shape in made
        )
        for piece in large_arrays.pieces(rows):
            count = piece.stop - piece.start
            phash[piece] = random.integers(0, 2**64, count, dtype=np.uint64)
            if crowded:  # a fifth are one image, and many are near it
                phash[piece][::5] = 0
                phash[piece][1::5] &= np.uint64(0xF)
            sums[piece] = random.integers(0, rows // 2, (count, 1))
            batch[piece], area[piece] = piece.start // 10_000, random.integers(1, 9, count)
            colours[piece] = random.integers(0, 3, (count, 1)) * 50
        tracemalloc.start()
        order = precedence(batch, area)
        find_duplicates(order, sums, phash, exact=True, distance=4, colours=colours, tolerance=8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0], peaks  # of four times the rows; arrays are not counted that are files
