"""Duplicates: compared with brute force, which row survives, and whether planted ones are found."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capstan.pipeline import config
from capstan.pipeline.config import WorldSource
from capstan.pipeline.image.decode import StoredImage, decode
from capstan.pipeline.image.phash import COLOUR_BYTES, read_colours
from capstan.pipeline.select import hash_pairs
from capstan.pipeline.select.arrays.apart import Apart
from capstan.pipeline.select.hash_pairs import close_pairs, colours_agree
from capstan.pipeline.select.near_duplicates import find_duplicates, near_reference, precedence
from capstan.pipeline.world.defects import defect, shown_index
from capstan.pipeline.world.scene import vocabulary
from capstan.pipeline.world.server import file_bytes


def rows(batch, area, sha256, phash, exact=True, distance=4):
    n = len(batch)
    order = precedence(np.array(batch), np.array(area), np.array([f"{i:02}" for i in range(n)], "S2"))
    found = find_duplicates(order, np.array(sha256, "S8"), np.array(phash, np.uint64), exact=exact, distance=distance)
    return found.kept.tolist(), found.exact.tolist()


def clustered(seed: int, n: int) -> np.ndarray:
    """Return hashes, many of them a few bits apart."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**64, max(1, n // 5), dtype=np.uint64)
    hashes = base[rng.integers(0, len(base), n)]
    for _ in range(4):
        hashes ^= rng.integers(0, 2, n, dtype=np.uint64) << rng.integers(0, 64, n, dtype=np.uint64)
    return hashes


def looks(seed: int, n: int) -> np.ndarray:
    """Return colours of three kinds, some slightly brighter."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(20, 200, (3, COLOUR_BYTES))
    return (kinds[rng.integers(0, 3, n)] + rng.integers(0, 4, (n, 1)) * 8).astype(np.uint8)


def brute_force(hashes: np.ndarray, colours: np.ndarray | None, distance: int, tolerance: int) -> list[int]:
    """Return for each row the first kept row before it that is near, or -1."""
    near: list[int] = []
    for row in range(len(hashes)):
        kept = np.array([before for before in range(row) if near[before] < 0], np.int64)
        close = kept[np.bitwise_count(hashes[kept] ^ hashes[row]) <= distance]
        if colours is not None:
            other = np.broadcast_to(colours[row], (len(close), COLOUR_BYTES))
            close = close[colours_agree(colours[close], other, tolerance)]
        near.append(int(close[0]) if len(close) else -1)
    return near


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 60), distance=st.integers(0, 16))
def test_close_pairs_are_those_of_brute_force(seed: int, n: int, distance: int) -> None:
    hashes = np.unique(clustered(seed, n))
    wanted = [
        (i, j) for j in range(len(hashes)) for i in range(j) if int(hashes[i] ^ hashes[j]).bit_count() <= distance
    ]
    earlier, later = close_pairs(hashes, distance)
    assert list(zip(earlier.tolist(), later.tolist(), strict=True)) == wanted


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 300),
    distance=st.integers(0, 8),
    bits=st.integers(0, 12),
    coloured=st.booleans(),
    few=st.sampled_from([4, 40, 1024]),
)
def test_near_duplicates_are_those_of_brute_force(
    seed: int, n: int, distance: int, bits: int, coloured: bool, few: int
) -> None:
    """Also if so many hashes differ in few bits that rows are split in halves."""
    hashes = clustered(seed, n)
    hashes[: n // 2] &= np.uint64((1 << bits) - 1)
    hashes = np.random.default_rng(seed).permutation(hashes)
    colours = looks(seed, n) if coloured else None
    with pytest.MonkeyPatch.context() as small:
        small.setattr(hash_pairs, "_FEW", few)
        small.setattr(hash_pairs, "MAX_PAIRS", 2 * n)
        small.setattr(hash_pairs, "MAX_CANDIDATES", 20 * n)
        found = find_duplicates(
            np.arange(n), np.arange(n, dtype=np.uint64).reshape(-1, 1), hashes, exact=False, distance=distance,
            colours=colours, tolerance=5,
        )  # fmt: skip
    assert found.kept.tolist() == brute_force(hashes, colours, distance, 5)


@pytest.mark.parametrize("sets", ["one", "five", "fifteen"])
def test_a_few_thousand_hashes_whatever_sets_of_bits_are_compared(sets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = clustered(7, 3000)
    bands = {"one": 100, "five": 100_000, "fifteen": 10_000_000}[sets]
    masks = hash_pairs._masks(bands, 4)
    assert len(masks) == {"one": 1, "five": 5, "fifteen": 15}[sets]
    monkeypatch.setattr(hash_pairs, "_masks", lambda n, distance: masks)
    found = find_duplicates(np.arange(3000), hashes.reshape(-1, 1), hashes, exact=False, distance=4)
    assert found.kept.tolist() == brute_force(hashes, None, 4, 0)


@pytest.mark.parametrize("mix", [0, 1 << 47])
def test_hashes_of_one_group_need_not_agree(mix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are made by 16 bits of what is mixed: none, or one bit, that tells hashes apart."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 1500, dtype=np.uint64)
    hashes[500:] = hashes[:1000] ^ np.uint64(0b1001)
    masks = hash_pairs._masks(10_000_000, 4)
    monkeypatch.setattr(hash_pairs, "_masks", lambda n, distance: masks)
    expected = [side.tolist() for side in close_pairs(hashes, 4)]
    monkeypatch.setattr(hash_pairs, "MIX", np.uint64(mix))
    assert [side.tolist() for side in close_pairs(hashes, 4)] == expected
    assert len(expected[0]) >= 500


def test_a_new_batch_changes_no_earlier_decision() -> None:
    hashes, area = clustered(3, 400), np.random.default_rng(3).integers(1, 5, 400)
    batch = np.repeat([0, 1], 200)

    def decided(n: int) -> list[int]:
        order = precedence(batch[:n], area[:n])
        found = find_duplicates(order, hashes[:n].reshape(-1, 1), hashes[:n], exact=True, distance=4)
        return found.kept.tolist()

    assert decided(400)[:200] == decided(200)


def test_the_larger_image_survives_then_the_smaller_key() -> None:
    assert rows([0, 0, 0], [10, 20, 20], ["a", "a", "a"], [0, 0, 0]) == ([1, -1, 1], [True, False, True])


def test_rows_of_an_earlier_batch_survive() -> None:
    kept, _ = rows([1, 0], [999, 1], ["a", "a"], [0, 0])
    assert kept == [1, -1]


def test_an_exact_duplicate_names_the_row_that_is_kept_in_the_end() -> None:
    kept, exact = rows([0, 0, 0], [30, 20, 10], ["a", "b", "b"], [0, 1, 1])
    assert (kept, exact) == ([-1, 0, 0], [False, False, True])


@pytest.mark.parametrize(("exact", "distance", "wanted"), [(False, None, [-1, -1]), (True, None, [-1, 0])])
def test_each_kind_can_be_left_out(exact, distance, wanted) -> None:
    assert rows([0, 0], [2, 1], ["a", "a"], [0, 0], exact=exact, distance=distance)[0] == wanted


def test_sums_that_mix_to_the_same_word_are_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are sorted by a hash of their words; here two different rows share it."""
    factor = 0x9E3779B97F4A7C15
    other = ((1 * factor) ^ ((2 * factor) % 2**64)) % 2**64
    words = np.array([[1, other ^ 5], [2, 5], [1, other ^ 5]], np.uint64)
    mixed = [(int(a) * factor) % 2**64 ^ int(b) for a, b in words]
    assert mixed[0] == mixed[1]
    found = find_duplicates(np.arange(3), words, np.zeros(3, np.uint64), exact=True, distance=None)
    assert found.kept.tolist() == [-1, -1, 0]


def test_a_reference_gives_the_first_that_is_near() -> None:
    hashes = clustered(5, 200)
    found = near_reference((hashes[:80], None), hashes[80:], None, 4, 0)
    apart = np.bitwise_count(hashes[80:, None] ^ hashes[None, :80]) <= 4
    assert found.tolist() == np.where(apart.any(axis=1), apart.argmax(axis=1), -1).tolist()
    assert near_reference((hashes[:0], None), hashes, None, 4, 0).tolist() == [-1] * 200


def test_planted_duplicates_are_found_and_nothing_else() -> None:
    """Precision and recall are at least 0.99, and far less with the hash alone: it sees no colour."""
    world = WorldSource(scenes=1500, size=128, seed=11)
    vocab, shown, images = vocabulary(world), [], []
    for index in range(world.scenes):
        if defect(world, index) not in ("missing", "html"):
            image = decode(file_bytes(world, vocab, index)[1], config.Image(size=128, min_size=32))
            if isinstance(image, StoredImage):
                shown.append(shown_index(world, index))
                images.append(image)
    order = precedence(np.zeros(len(shown), np.int64), np.array([p.original_width for p in images]))

    def quality(colours: np.ndarray | None) -> tuple[float, float]:
        found = find_duplicates(
            order,
            np.array([p.sha256 for p in images], "S64"),
            np.array([p.phash for p in images], np.uint64),
            exact=True,
            distance=config.Dedup().perceptual,
            colours=colours,
            tolerance=config.Dedup().colours or 0,
        )
        repeats = np.flatnonzero(found.kept >= 0)
        right = sum(shown[row] == shown[found.kept[row]] for row in repeats)
        return right / len(repeats), right / (len(shown) - len(set(shown)))

    precision, recall = quality(read_colours(pa.chunked_array([[p.colours for p in images]])))
    assert precision >= 0.99
    assert recall >= 0.99
    assert quality(None)[0] < 0.9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 60), distance=st.integers(0, 8), few=st.booleans())
@example(seed=385, n=40, distance=2, few=False)
def test_rows_that_are_apart_repeat_only_others(seed: int, n: int, distance: int, few: bool) -> None:
    """The first kept row that is near, or the same file, and from which a row is not apart; also in halves."""
    rng = np.random.default_rng(seed)
    hashes, area = clustered(seed, n), rng.integers(1, 4, n)
    pairs = np.array([rng.choice(n, 2, replace=False) for _ in range(rng.integers(0, 2 * n))], np.int64).reshape(-1, 2)
    apart, order = Apart.of(n, pairs), precedence(np.zeros(n, np.int64), area)
    sums = hashes.reshape(-1, 1)  # files are equal where their hashes are
    with pytest.MonkeyPatch.context() as patch:
        if few:
            patch.setattr(hash_pairs, "_FEW", 8)
            patch.setattr(hash_pairs, "MAX_PAIRS", 4)
        found = find_duplicates(order, sums, hashes, exact=True, distance=distance, apart=apart)
    told, kept = {frozenset(pair) for pair in pairs.tolist()}, list[int]()
    free = set[np.uint64]()  # files of the rows before that are in no pair
    for row in order.tolist():
        near = [k for k in kept if int(hashes[k] ^ hashes[row]).bit_count() <= distance and {k, row} not in told]
        assert found.kept[row] == (near[0] if near else -1)
        # A row that repeats the file of one that is no longer kept is an exact repeat, too.
        same = {hashes[k] for k in near[:1]} | (set() if row in apart.rows else free)
        assert found.exact[row] == (bool(near) and hashes[row] in same)
        kept += [] if near else [row]
        free |= set() if row in apart.rows else {hashes[row]}
