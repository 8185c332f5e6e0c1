"""Find near repeats of perceptual hashes and colours

Two images are near if their perceptual hashes differ in at most `distance` bits. If colours are compared too, they must
agree within a tolerance once brightness and contrast are equalised: the hash sees no colour, and 64 bits describe
shapes only roughly.

Hashes are compared only if they agree on some of their bits (Norouzi et al., Fast Exact Search in Hamming Space with
Multi-Index Hashing, 2014; here by sorting, which numpy vectorises and runs without Python's lock). Hashes of 6 bands
that differ in 4 bits at most agree on 2 bands: 15 sorts of 10 million hashes, each by 21 bits, leave 5 candidates per
hash. If many hashes are close together (one template with different words), their pairs are too many to list. Rows are
then split in halves: rows near a kept row of the first half are removed before the second half is compared with itself.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from capstan.pipeline.select.arrays.apart import NOTHING, Apart
from capstan.pipeline.select.arrays.hash_blocks import MIX, block_bits, blocks_of, in_threads
from capstan.pipeline.select.arrays.large_arrays import (
    Array,
    Ints,
    Rows,
    filled,
    made_of,
    numbers,
    pieces,
    release,
    taken,
    which,
)

HASH_BITS: Final = 64
MAX_CANDIDATES = 1 << 31  # pairs of rows compared in one pass; beyond that rows are split in halves
MAX_PAIRS = 1 << 23  # near pairs held in memory
MAX_GAIN: Final = 1.2  # largest ratio of contrast between near images
MAX_OFFSET: Final = 30  # largest difference of brightness, levels of 256
_PART_OF_CONTRAST: Final = 0.1
_LEAST_TOLERANCE: Final = 2.0  # levels
_FEW = 1024  # rows that are never split
_MANY: Final = 1 << 18  # rows, about, that meet a few
_FEW_BYTES: Final = 512 << 20  # that `Few` may hold
_CHUNK = 1 << 16  # rows compared together, so that they stay in the cache

Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]
Pairs = tuple[Ints, Ints]


@dataclass(frozen=True)
class Prints:
    """Hashes and colours of n rows, in order of precedence, and the limits by which they are compared."""

    phash: Words  # [n]
    colours: Bytes | None  # [m, bytes], of `rows`; they are wide, and not copied
    distance: int
    tolerance: int
    rows: Ints | None = None  # [n], as `colours` and `apart` number them; None: from 0
    apart: Apart = NOTHING  # pairs that are not near, whatever their hashes

    def __len__(self) -> int:
        return len(self.phash)

    def take(self, rows: Rows) -> Prints:
        if isinstance(rows, slice):
            own = made_of(rows.stop - rows.start, lambda piece: self.numbers(numbers(piece) + rows.start), np.int64)
            return Prints(self.phash[rows], self.colours, self.distance, self.tolerance, own, self.apart)
        own = rows if self.rows is None else taken(self.rows, rows)
        return Prints(taken(self.phash, rows), self.colours, self.distance, self.tolerance, own, self.apart)

    def numbers(self, rows: Ints) -> Ints:
        """Return the numbers of these rows in `colours` and `apart`."""
        return rows if self.rows is None else self.rows[rows]

    def words(self, rows: Rows) -> list[Words]:
        """Return what makes rows equal, in words, [rows] each."""
        own, found = self.numbers(numbers(rows)), [self.phash[rows]]
        if self.colours is not None:
            found += list(np.ascontiguousarray(self.colours[own]).view(np.uint64).T)
        return found + ([self.apart.alone(own)] if len(self.apart.codes) else [])

    def agree(self, rows: Ints, later: Prints, others: Ints) -> npt.NDArray[np.bool_]:
        """Return whether the colours of rows[i] agree with those of the later others[i], and they are not apart."""
        a, b = self.numbers(rows), later.numbers(others)
        close = np.ones(len(rows), bool)
        if self.colours is not None and later.colours is not None:
            close = colours_agree(self.colours[a], later.colours[b], self.tolerance)
        if len(self.apart.codes):
            close &= ~self.apart.has(a, b)
        return close


def colours_agree(a: Bytes, b: Bytes, tolerance: int) -> npt.NDArray[np.bool_]:
    """Return whether the levels a[i] and b[i], [n, levels], agree once brightness and contrast are equalised.

    Brightness and contrast may differ as far as saving an image again changes them. Levels may then differ by a tenth
    of their standard deviation (scaling changes busy images more than plain ones), at least 2 and at most `tolerance`.
    """
    one, other = a.astype(np.float32), b.astype(np.float32)
    mean, other_mean = one.mean(axis=1, keepdims=True), other.mean(axis=1, keepdims=True)
    one, other = one - mean, other - other_mean
    gain = (one * other).sum(axis=1) / np.maximum((one * one).sum(axis=1), 1.0)
    gain = gain.clip(1 / MAX_GAIN, MAX_GAIN)[:, None]
    left = np.abs(one * gain - other).max(axis=1)
    allowed = (_PART_OF_CONTRAST * other.std(axis=1)).clip(_LEAST_TOLERANCE, None).clip(None, tolerance)
    return np.asarray((left <= allowed) & (np.abs(mean - other_mean)[:, 0] <= MAX_OFFSET))


def first_kept(prints: Prints) -> Ints:
    """Return for each row the first kept row near it; -1 for those kept."""
    n = len(prints)
    if (pairs := _pairs(prints, few=n <= _FEW)) is not None:
        return _greedy(n, *pairs)
    half = n // 2
    near = filled(n, -1, np.int64)
    _put(near, 0, first_kept(prints.take(slice(0, half))))
    kept = which(half, lambda piece: near[piece] < 0)
    later = prints.take(slice(half, n))
    found = first_near(prints.take(kept), later)
    _put(near, half, made_of(len(found), lambda piece: _named(kept, found[piece]), np.int64))
    left = which(n - half, lambda piece: found[piece] < 0)
    again = first_kept(later.take(left))
    for piece in pieces(len(left)):
        near[half + left[piece]] = _named(left, again[piece], half)
    return near


def _put(near: Ints, start: int, found: Ints) -> None:
    for piece in pieces(len(found)):
        near[start + piece.start : start + piece.stop] = found[piece]
    release(near, found)


def _named(rows: Ints, found: Ints, start: int = 0) -> Ints:
    """Return start + rows[found], and -1 where found is -1."""
    return np.where(found >= 0, start + rows[found], -1) if len(rows) else found


def _greedy(n: int, earlier: Ints, later: Ints) -> Ints:
    """Return for each of n rows the first kept row near it, or -1; pairs are sorted by later, then earlier row."""
    fate = filled(n, -1, np.int64)
    rows = np.unique(np.concatenate([earlier, later]))
    near = [-1] * len(rows)
    for start in range(0, len(later), _CHUNK):
        part = slice(start, start + _CHUNK)
        places = [np.searchsorted(rows, side[part]).tolist() for side in (earlier, later)]
        for before, after in zip(*places, strict=True):
            if near[after] < 0 and near[before] < 0:
                near[after] = before
    fate[rows] = _named(rows, np.array(near, np.int64))
    return fate


def close_pairs(phash: Words, distance: int) -> Pairs:
    """All pairs (i < j) of hashes at most `distance` bits apart, sorted by j, then i."""
    pairs = _pairs(Prints(phash, None, distance, 0), few=True)
    assert pairs is not None
    return pairs


def _pairs(prints: Prints, *, few: bool) -> Pairs | None:
    """All near pairs (i < j), sorted by j, then i; None if they or their candidates are too many, unless `few`."""
    n, masks = len(prints), _masks(len(prints), prints.distance)
    limit = None if few else MAX_CANDIDATES // len(masks)
    codes, count = [np.empty(0, np.int64)], 0
    for number in range(len(masks)):
        found = _codes(prints, masks, number, limit, MAX_PAIRS - count)
        if found is None:
            return None
        codes.append(found)
        count += len(found)
    whole = np.concatenate(codes)
    whole.sort()
    return whole % max(n, 1), whole // max(n, 1)


def _codes(prints: Prints, masks: list[int], number: int, limit: int | None, most: int) -> Ints | None:
    """Return the near pairs that agree on one mask, and on no mask before it, as j * n + i.

    None if there are more than `most`, or more than `limit` candidates; without a limit all are returned.
    """
    bits = block_bits(len(prints))
    blocks = blocks_of(prints.phash, masks[number], bits)

    def of_block(place: int) -> tuple[int, list[Ints]]:
        rows, hashes = blocks[place]
        by, later = _grouped(hashes, masks[number], bits)
        candidates = int(later.sum(dtype=np.int64))
        if limit is not None and candidates > limit:
            return candidates, []
        found = _agreeing(prints, masks, number, rows[by], hashes[by], later)
        codes = [b * len(prints) + a for a, b in found]
        release(rows, hashes)
        if prints.colours is not None and codes:
            release(prints.colours)
        return candidates, codes

    codes, tried, count = [np.empty(0, np.int64)], 0, 0
    with contextlib.closing(in_threads(of_block, len(blocks))) as found:
        for candidates, own in found:
            tried, count = tried + candidates, count + sum(map(len, own))
            if limit is not None and (tried > limit or count > most):
                return None
            codes += own
    return np.concatenate(codes)


def _grouped(hashes: Words, mask: int, bits: int) -> tuple[Ints, npt.NDArray[np.int32]]:
    """Return an order of a block's hashes in which those that agree on the bits of a mask are in one group.

    Also return how many of its group come after each. Groups are made by 16 bits, which numpy sorts by radix; so some
    hold hashes that do not agree.
    """
    mixed = (hashes & np.uint64(mask)) * MIX  # its first bits are those of the block
    group = (mixed >> np.uint64(48 - bits)).astype(np.uint16)
    by = np.argsort(group, kind="stable")
    group = group[by]
    ends = np.append(np.flatnonzero(group[1:] != group[:-1]) + 1, len(group))
    later = np.repeat(ends, np.diff(ends, prepend=0)) - np.arange(1, len(group) + 1)
    return by, later.astype(np.int32)


def _agreeing(
    prints: Prints, masks: list[int], number: int, order: Ints, hashes: Words, later: npt.NDArray[np.int32]
) -> Iterator[Pairs]:
    """Yield near pairs (i < j) of rows whose hashes agree on the bits of one mask, and on no mask before it.

    `order` holds the rows, `hashes` theirs, in groups; `later` is how many of its group come after each.
    """
    mask, distance = np.uint64(masks[number]), prints.distance
    for start in range(0, len(hashes), _CHUNK):
        # Compare each row with the next one of its group, the one after, …
        rows, step, asked = np.arange(start, min(start + _CHUNK, len(hashes))), 0, 1
        while True:
            step += 1
            rows = rows[: np.searchsorted(rows, len(hashes) - step)]
            if step >= asked:  # rows that are compared with another group cost time and nothing else
                left, asked = _at(later, rows) >= step, step + 1 + step // 8
                if not (most := np.count_nonzero(left)):
                    break
                if most < len(rows) - len(rows) // 4:  # else they stay a slice
                    rows = rows[left]
            apart = _at(hashes, rows) ^ _at(hashes, rows, step)
            close = np.flatnonzero((np.bitwise_count(apart) <= distance) & ((apart & mask) == 0))
            if len(close):
                apart, hits = apart[close], rows[close]
                first = np.ones(len(close), bool)
                for earlier in masks[:number]:
                    first &= (apart & np.uint64(earlier)) != 0
                one, other = order[hits[first]], order[hits[first] + step]
                a, b = np.minimum(one, other), np.maximum(one, other)
                agree = prints.agree(a, prints, b)
                yield a[agree], b[agree]


def _at(values: npt.NDArray[Any], rows: Ints, step: int = 0) -> npt.NDArray[Any]:
    """Return values[rows + step]; of consecutive rows a slice."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return values[int(rows[0]) + step : int(rows[-1]) + 1 + step]
    return values[rows + step]


def first_near(kept: Prints, rows: Prints) -> Ints:
    """Return for each of `rows` the first of `kept` that is near it, or -1."""
    count = max(len(kept), len(rows))
    nobody, bits = len(kept), block_bits(count)
    best = filled(len(rows), nobody, np.int64)
    for mask in _masks(count, rows.distance):
        _meet_all(kept, rows, mask, bits, best)
    return made_of(len(rows), lambda piece: np.where(best[piece] < nobody, best[piece], -1), np.int64)


def _meet_all(kept: Prints, rows: Prints, mask: int, bits: int, best: Ints) -> None:
    """Lower `best` of each of `rows` to the first of `kept` that is near and agrees on a mask."""
    of_kept, of_rows = blocks_of(kept.phash, mask, bits), blocks_of(rows.phash, mask, bits)

    def of_block(place: int) -> None:
        _meet(kept, of_kept[place], rows, of_rows[place], np.uint64(mask), best)  # no row is in two blocks
        release(*of_kept[place], *of_rows[place])

    list(in_threads(of_block, len(of_rows)))
    release(best)


def _meet(kept: Prints, held: list[Array], rows: Prints, chosen: list[Array], mask: np.uint64, best: Ints) -> None:
    """Lower `best` of the `chosen` rows to the first of the kept rows `held` that is near and agrees on a mask.

    Both are rows and their hashes.
    """
    (held_rows, hashes), (own_rows, own_hashes) = held, chosen
    by, order = np.argsort(hashes & mask), np.argsort(own_hashes & mask)
    hashes, by = hashes[by], held_rows[by]
    keys = hashes & mask
    for start in range(0, len(order), _CHUNK):
        at, own = own_rows[order[start : start + _CHUNK]], own_hashes[order[start : start + _CHUNK]]
        low, high = (np.searchsorted(keys, own & mask, side) for side in ("left", "right"))
        while len(at):
            more = low < high
            at, own, low, high = at[more], own[more], low[more], high[more]
            close = np.flatnonzero(np.bitwise_count(own ^ hashes[low]) <= rows.distance)
            hit, found = at[close], by[low[close]]
            agree = kept.agree(found, rows, hit)
            np.minimum.at(best, hit[agree], found[agree])
            low = low + 1


def rows_of_few(rows: int, distance: int) -> int:
    """Return how many rows, of `rows` at most, a `Few` may have whose tables need no more than 512 MiB.

    >>> [rows_of_few(1_000_000, distance) for distance in (4, 6, 8, 12)]
    [1000000, 1000000, 125000, 62500]
    """
    while rows > _FEW and len(_masks(rows, distance, _MANY)) * (12 * rows + (4 << rows.bit_length())) > _FEW_BYTES:
        rows //= 2
    return rows


class Few:
    """Some rows, sorted by the bits of each mask, for many kept rows to meet, which are not sorted.

    For each mask it holds 12 bytes per row, and a table of 32 to 64 bits per row. See `rows_of_few`.
    """

    def __init__(self, prints: Prints) -> None:
        self._prints, self._sorted = prints, list[tuple[np.uint64, Words, npt.NDArray[np.int32], np.uint64, Bytes]]()
        for mask in map(np.uint64, _masks(len(prints), prints.distance, _MANY) if len(prints) else ()):
            keys = prints.phash & mask
            by = np.argsort(keys).astype(np.int32)
            shift = np.uint64(HASH_BITS - len(keys).bit_length() - 5)
            there = np.zeros(1 << (HASH_BITS - int(shift)), bool)  # most kept rows agree with none, as this table says
            there[(keys * MIX) >> shift] = True
            self._sorted.append((mask, keys[by], by, shift, np.packbits(there, bitorder="little")))

    def first_near(self, kept: Prints) -> Ints:
        """Return for each row the first of `kept` that is near it, or -1: what the function `first_near` returns."""
        few = self._prints
        best = np.full(len(few), len(kept), np.int64)
        for mask, keys, by, shift, there in self._sorted:
            for piece in (slice(start, start + _CHUNK) for start in range(0, len(kept), _CHUNK)):
                own = kept.phash[piece] & mask
                bit = (own * MIX) >> shift
                rows = np.flatnonzero(there[bit >> np.uint64(3)] >> (bit & np.uint64(7)).astype(np.uint8) & np.uint8(1))
                low, high = (np.searchsorted(keys, own[rows], side) for side in ("left", "right"))
                for left, right in matches(low, high):
                    a, b = piece.start + rows[left], by[right]
                    close = np.bitwise_count(kept.phash[a] ^ few.phash[b]) <= few.distance
                    a, b = a[close], b[close]
                    agree = kept.agree(a, few, b)
                    np.minimum.at(best, b[agree], a[agree])
        return np.where(best < len(kept), best, -1)


def matches(low: Ints, high: Ints) -> Iterator[Pairs]:
    """Yield all pairs of i and a number from low[i] up to high[i], some ten thousands at a time."""
    ends: Ints = np.cumsum(high - low)
    for start in range(0, int(ends[-1]) if len(ends) else 0, _CHUNK):
        number = np.arange(start, min(start + _CHUNK, int(ends[-1])))
        left = np.searchsorted(ends, number, "right")
        yield left, high[left] - (ends[left] - number)


def _masks(n: int, distance: int, others: int = 0) -> list[int]:
    """Return bit masks such that two hashes at most `distance` bits apart agree on all bits of at least one mask.

    At most `distance` of `count` bands can differ, so count - distance agree. More bands make more masks, and fewer of
    n hashes agree by chance: the count of least cost is chosen. For small n there is one empty mask (all pairs). With
    `others`, so many hashes are compared with the n.

    >>> len(_masks(100, 4)), len(_masks(100_000, 4)), len(_masks(10_000_000, 4))
    (1, 5, 15)
    """
    counts = range(distance + 1, min(distance + 6, HASH_BITS) + 1)
    best = min([distance, *counts], key=lambda count: _cost(n, distance, count, others))
    bands = [sum(1 << bit for bit in range(band, HASH_BITS, best)) for band in range(best)]
    return [sum(chosen) for chosen in itertools.combinations(bands, best - distance)]


def _cost(n: int, distance: int, count: int, others: int = 0) -> float:
    """Estimate the nanoseconds that comparing n random hashes, or n with `others`, takes with `count` bands."""
    sets = math.comb(count, distance)
    bits = HASH_BITS * (count - distance) / count if count else 0
    if others:
        agree = n / 2**bits  # of the n with each of the others; the table lets one in 32 pass besides
        return sets * (200_000 + 100 * n + others * (8 + 150 * (min(1, agree) + 1 / 32) + 30 * agree))
    return sets * (200_000 + 100 * n + 3 * n * n / 2 ** (bits + 1))
