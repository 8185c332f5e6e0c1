"""Hashes of pictures → which ones repeat another: exactly (SHA-256 of the source) or nearly (perceptual hash).

Rows are looked at in one order of precedence: earlier batch first (what is packed stays), then the larger picture, then
the smaller key. A row is a duplicate if a kept row before it is the same, or lies within the distance. So the outcome
depends on the rows alone, and new rows never unseat old ones.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HASH_BITS = 64
_CHUNK = 1 << 20  # pairs looked at together

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Duplicates:
    """For each of n rows: the index of the kept row that it repeats, or -1; `exact` where the files are the same."""

    kept: Ints  # [n]
    exact: npt.NDArray[np.bool_]  # [n]


def precedence(batch: Ints, area: Ints, key: npt.NDArray) -> Ints:
    """Row indices [n], the one that stays first. `area` in pixels, of the source."""
    return np.lexsort((key, -area, batch))


def find_duplicates(
    order: Ints, sha256: npt.NDArray[np.bytes_], phash: npt.NDArray[np.uint64], *, exact: bool, distance: int | None
) -> Duplicates:
    """Which of n rows repeat another. `order` is their precedence; `distance` in bits of `phash`, None: don't look."""
    n = len(order)
    kept = np.full(n, -1, np.int64)
    if exact:
        first = _first_equal(sha256[order])
        kept[order] = np.where(first < np.arange(n), order[first], -1)
    same_file = kept >= 0
    if distance is not None:
        left = order[~same_file[order]]
        near = _near(phash[left], distance)
        kept[left] = np.where(near >= 0, left[near], -1)
        # What repeats a file exactly repeats whatever that file was found to repeat.
        root = kept[kept[same_file]]
        kept[same_file] = np.where(root >= 0, root, kept[same_file])
    return Duplicates(kept, same_file)


def _first_equal(values: npt.NDArray) -> Ints:
    """For each value the index of the first that equals it."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.asarray(first[inverse.reshape(-1)], np.int64)


def _near(phash: npt.NDArray[np.uint64], distance: int) -> Ints:
    """For each hash, in order of precedence, the first kept one within `distance` bits; -1 for those kept.

    Equal hashes share their fate, so only the first of each is compared.
    """
    first = _first_equal(phash)
    (unique,) = np.nonzero(first == np.arange(len(phash)))
    near_unique = np.full(len(unique), -1, np.int64)
    earlier, later = close_pairs(phash[unique], distance)
    for before, after in zip(earlier.tolist(), later.tolist(), strict=True):  # sorted by `after`, then `before`
        if near_unique[after] < 0 and near_unique[before] < 0:
            near_unique[after] = before
    fate = np.full(len(phash), -1, np.int64)
    fate[unique] = np.where(near_unique >= 0, unique[near_unique], -1)
    repeats = first < np.arange(len(phash))
    fate[repeats] = np.where(fate[first[repeats]] >= 0, fate[first[repeats]], first[repeats])
    return fate


def close_pairs(phash: npt.NDArray[np.uint64], distance: int) -> tuple[Ints, Ints]:
    """All pairs (i < j) of distinct hashes at most `distance` bits apart, sorted by j, then i.

    Exact, by pigeonholes: cut into distance + 1 bands, two such hashes agree on a band at least. Sorted by a band, each
    hash is compared with the next one, the one after, ... of its own band.
    """
    n = len(phash)
    codes = np.empty(0, np.int64)
    for shift, width in _bands(distance + 1):
        band = (phash >> np.uint64(shift)) & np.uint64((1 << width) - 1)
        order = np.argsort(band, kind="stable")
        sorted_band, sorted_hash = band[order], phash[order]
        starts = np.arange(n, dtype=np.int64)
        step = 1
        while len(starts := starts[starts + step < n]):
            starts = starts[sorted_band[starts] == sorted_band[starts + step]]
            for chunk in np.array_split(starts, len(starts) // _CHUNK + 1):
                apart = np.bitwise_count(sorted_hash[chunk] ^ sorted_hash[chunk + step])
                hits = chunk[apart <= distance]
                a, b = order[hits], order[hits + step]
                codes = np.concatenate([codes, np.maximum(a, b) * n + np.minimum(a, b)])
            step += 1
    codes = np.unique(codes)
    return codes % max(n, 1), codes // max(n, 1)


def _bands(count: int) -> list[tuple[int, int]]:
    """(shift, width) of `count` bands that cover the 64 bits as evenly as can be.

    >>> _bands(5)
    [(0, 13), (13, 13), (26, 13), (39, 13), (52, 12)]
    """
    edges = [HASH_BITS * band // count + (HASH_BITS * band % count > 0) for band in range(count + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(edges)]
