"""Find exact repeats (SHA-256) and near repeats (perceptual hash).

Rows are visited in one order of precedence: earlier batch first (packed samples stay), then larger image, then smaller
key. A row is a duplicate if a kept row before it is identical, or near. New rows never displace old ones.

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
from typing import Final

import numpy as np
import numpy.typing as npt

from capstan.pipeline.select.apart import NOTHING, Apart
from capstan.pipeline.select.equal_rows import as_words, decide_equal, first_equal
from capstan.pipeline.select.hash_blocks import block_bits, blocks_of, in_threads

HASH_BITS: Final = 64
NONE, EXACT, PERCEPTUAL, SEMANTIC, CONTAMINATED, COPIES = range(6)
REASONS: Final = ("", "exact", "perceptual", "semantic", "contaminated", "copies")

MAX_CANDIDATES = 1 << 31  # pairs of rows compared in one pass; beyond that rows are split in halves
MAX_PAIRS = 1 << 23  # near pairs held in memory
MAX_GAIN: Final = 1.2  # largest ratio of contrast between near images
MAX_OFFSET: Final = 30  # largest difference of brightness, levels of 256
_PART_OF_CONTRAST: Final = 0.1
_LEAST_TOLERANCE: Final = 2.0  # levels
_FEW = 1024  # rows that are never split
_CHUNK = 1 << 16  # rows compared together, so that they stay in the cache

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]
Pairs = tuple[Ints, Ints]


@dataclass(frozen=True)
class Duplicates:
    """For each of n rows: the index of the kept row that it repeats, or -1; and how (EXACT, …; NONE)."""

    kept: Ints  # [n]
    kind: npt.NDArray[np.int8]  # [n]

    @property
    def exact(self) -> npt.NDArray[np.bool_]:
        """Mask [n] of rows whose file is identical to a kept one."""
        return self.kind == EXACT


def precedence(batch: Ints, area: Ints, key: npt.NDArray[np.bytes_] | None = None) -> Ints:
    """Return row indices [n] by precedence. `area` is the source's, in pixels.

    Without `key`, rows of a batch must be in the order of their keys.
    """
    by = (-area, batch)
    return np.lexsort(by if key is None else (key, *by))


def find_duplicates(
    order: Ints,
    sha256: npt.NDArray[np.bytes_] | Words,
    phash: Words,
    *,
    exact: bool,
    distance: int | None,
    colours: Bytes | None = None,
    tolerance: int = 0,
    apart: Apart = NOTHING,
    hashed: npt.NDArray[np.bool_] | None = None,
) -> Duplicates:
    """Find the rows that repeat another.

    `order` [n] is their precedence; `sha256` is text, or words [n, w]. `distance` is in bits of `phash` (None: no near
    duplicates). `colours` [n, bytes], if given, must then agree too, within `tolerance`. Pairs that are `apart` do not
    repeat each other. `hashed` [n] masks the rows whose `phash` is known (None: all).
    """
    n = len(order)
    kept = np.full(n, -1, np.int64)
    words = as_words(sha256).T if exact else np.zeros((0, n), np.uint64)
    if exact:
        # Rows of pairs are left to the search for near ones, which asks about each pair.
        own = [apart.alone(np.arange(n))] if len(apart.codes) and distance is not None else []
        first = first_equal([*words, *own], order)
        kept = np.where(first != np.arange(n), first, -1)
        if len(apart.codes) and distance is None:
            decide_equal(kept, first, order, apart)
    kind = np.where(kept >= 0, EXACT, NONE).astype(np.int8)
    if distance is not None:
        left = order[(kept[order] < 0) & (True if hashed is None else hashed[order])]
        near = _near(_Prints(phash, colours, distance, tolerance, np.arange(n), apart).take(left))
        settle(kept, kind, left, near, PERCEPTUAL)
        if exact and len(apart.codes):
            (found,) = np.nonzero(kind == PERCEPTUAL)
            kind[found[(words[:, found] == words[:, kept[found]]).all(axis=0)]] = EXACT
    return Duplicates(kept, kind)


def settle(kept: Ints, kind: npt.NDArray[np.int8], left: Ints, near: Ints, reason: int, apart: Apart = NOTHING) -> Ints:
    """Record that row left[i] repeats left[near[i]] (-1: none).

    Rows that repeated a row which is no longer kept now repeat the row which that one repeats. Return those that are
    `apart` from it.
    """
    before = np.flatnonzero(kept >= 0)
    kept[left] = np.where(near >= 0, left[near], -1)
    kind[left[near >= 0]] = reason
    root = kept[kept[before]]
    kept[before] = np.where(root >= 0, root, kept[before])
    return before[apart.has(before, kept[before])]


# Near duplicates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prints:
    """Hashes and colours of n rows, in order of precedence, and the limits by which they are compared."""

    phash: Words  # [n]
    colours: Bytes | None  # [m, bytes], of `rows`; they are wide, and not copied
    distance: int
    tolerance: int
    rows: Ints | None = None  # [n], as `colours` and `apart` number them; None: from 0
    apart: Apart = NOTHING  # pairs that are not near, whatever their hashes

    def __len__(self) -> int:
        return len(self.phash)

    def take(self, rows: Ints | slice) -> _Prints:
        own = np.arange(len(self.phash))[rows] if self.rows is None else self.rows[rows]
        return _Prints(self.phash[rows], self.colours, self.distance, self.tolerance, own, self.apart)

    def numbers(self, rows: Ints) -> Ints:
        """Return the numbers of these rows in `colours` and `apart`."""
        return rows if self.rows is None else self.rows[rows]

    def agree(self, rows: Ints, later: _Prints, others: Ints) -> npt.NDArray[np.bool_]:
        """Return whether the colours of rows[i] agree with those of the later others[i], and they are not apart."""
        a, b = self.numbers(rows), later.numbers(others)
        close = np.ones(len(rows), bool)
        if self.colours is not None and later.colours is not None:
            close = colours_agree(self.colours[a], later.colours[b], self.tolerance)
        if len(self.apart.codes):
            close &= ~self.apart.has(a, b)
        return close


@dataclass(frozen=True)
class _Words:
    """What makes rows equal, in words, [n] each. Those of colours are held only while they are compared."""

    prints: _Prints

    def __iter__(self) -> Iterator[Words]:
        prints, rows = self.prints, self.prints.numbers(np.arange(len(self.prints)))
        yield prints.phash
        if prints.colours is not None:
            words = np.ascontiguousarray(prints.colours).view(np.uint64)
            yield from (words[rows, place] for place in range(words.shape[1]))
        if len(prints.apart.codes):
            yield prints.apart.alone(rows)


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


def near_reference(
    reference: tuple[Words, Bytes | None], phash: Words, colours: Bytes | None, distance: int, tolerance: int
) -> Ints:
    """Return for each row the first of `reference` (hashes, colours) that is near it, or -1."""
    return _first_near(_Prints(*reference, distance, tolerance), _Prints(phash, colours, distance, tolerance))


def _near(prints: _Prints) -> Ints:
    """Return for each row, in order of precedence, the first kept row near it; -1 for those kept.

    Rows with equal hashes and colours get the same result, so only the first of each is compared.
    """
    n = len(prints)
    first = first_equal(_Words(prints), np.arange(n))
    (unique,) = np.nonzero(first == np.arange(n))
    found = _first_kept(prints.take(unique))
    fate = np.full(n, -1, np.int64)
    fate[unique] = np.where(found >= 0, unique[found], -1)
    (repeats,) = np.nonzero(first != np.arange(n))
    fate[repeats] = np.where(fate[first[repeats]] >= 0, fate[first[repeats]], first[repeats])
    return fate


def _first_kept(prints: _Prints) -> Ints:
    """Return for each row the first kept row near it; -1 for those kept."""
    pairs = _pairs(prints, few=len(prints) <= _FEW)
    if pairs is not None:
        return _greedy(len(prints), *pairs)
    half = len(prints) // 2
    near = np.full(len(prints), -1, np.int64)
    near[:half] = _first_kept(prints.take(slice(0, half)))
    (kept,) = np.nonzero(near[:half] < 0)
    found = _first_near(prints.take(kept), prints.take(slice(half, None)))
    near[half:] = np.where(found >= 0, kept[found], -1)
    left = half + np.flatnonzero(found < 0)
    found = _first_kept(prints.take(left))
    near[left] = np.where(found >= 0, left[found], -1)
    return near


def _greedy(n: int, earlier: Ints, later: Ints) -> Ints:
    """Return for each of n rows the first kept row near it, or -1; pairs are sorted by later, then earlier row."""
    near = [-1] * n if len(later) else []
    for start in range(0, len(later), _CHUNK):
        part = slice(start, start + _CHUNK)
        for before, after in zip(earlier[part].tolist(), later[part].tolist(), strict=True):
            if near[after] < 0 and near[before] < 0:
                near[after] = before
    return np.array(near, np.int64) if len(later) else np.full(n, -1, np.int64)


def close_pairs(phash: Words, distance: int) -> Pairs:
    """All pairs (i < j) of hashes at most `distance` bits apart, sorted by j, then i."""
    pairs = _pairs(_Prints(phash, None, distance, 0), few=True)
    assert pairs is not None
    return pairs


def _pairs(prints: _Prints, *, few: bool) -> Pairs | None:
    """All near pairs (i < j), sorted by j, then i; None if they or their candidates are too many, unless `few`."""
    n, masks = len(prints), _masks(len(prints), prints.distance)
    limit = None if few else MAX_CANDIDATES // len(masks)
    codes, count = [np.empty(0, np.int64)], 0
    for number in range(len(masks)):
        found = _codes(prints, masks, number, limit, MAX_PAIRS - count)
        if found is None:
            return None
        codes, count = codes + found, count + sum(map(len, found))
    whole = np.sort(np.concatenate(codes))
    return whole % max(n, 1), whole // max(n, 1)


def _codes(prints: _Prints, masks: list[int], number: int, limit: int | None, most: int) -> list[Ints] | None:
    """Return the near pairs that agree on one mask, and on no mask before it, as j * n + i.

    None if there are more than `most`, or more than `limit` candidates; without a limit all are returned.
    """
    blocks = blocks_of(prints.phash, masks[number], block_bits(len(prints)))

    def of_block(place: int) -> tuple[int, list[Ints]]:
        order, candidates = _sorted(prints.phash, blocks[place], masks[number], limit)
        if limit is not None and candidates > limit:
            return candidates, []
        return candidates, [b * len(prints) + a for a, b in _agreeing(prints, masks, number, order)]

    codes, tried, count = list[Ints](), 0, 0
    with contextlib.closing(in_threads(of_block, len(blocks))) as found:
        for candidates, own in found:
            tried, count = tried + candidates, count + sum(map(len, own))
            if limit is not None and (tried > limit or count > most):
                return None
            codes += own
    return codes


def _sorted(phash: Words, rows: Ints, mask: int, limit: int | None) -> tuple[Ints, int]:
    """Return the rows sorted by the bits of a mask, and the number of pairs that agree on them (0 without `limit`)."""
    keys = phash[rows] & np.uint64(mask)
    by = np.argsort(keys)
    if limit is None or not len(rows):
        return rows[by], 0
    bounds = np.flatnonzero(np.diff(keys[by])) + 1
    sizes = np.diff(np.concatenate([[0], bounds, [len(rows)]]))
    return rows[by], int((sizes * (sizes - 1) // 2).sum())


def _agreeing(prints: _Prints, masks: list[int], number: int, order: Ints) -> Iterator[Pairs]:
    """Yield near pairs (i < j) of rows whose hashes agree on the bits of one mask, and on no mask before it.

    `order` holds the rows, sorted by these bits.
    """
    mask, distance = np.uint64(masks[number]), prints.distance
    hashes = prints.phash[order]
    for start in range(0, len(hashes), _CHUNK):
        # Compare each row with the next one, the one after, … as long as they agree.
        rows, step = np.arange(start, min(start + _CHUNK, len(hashes))), 0
        while True:
            step += 1
            rows = rows[: np.searchsorted(rows, len(hashes) - step)]
            apart = _apart(hashes, rows, step)
            same = (apart & mask) == 0
            close = np.flatnonzero(same & (np.bitwise_count(apart) <= distance))
            if len(close):
                apart, hits = apart[close], rows[close]
                first = np.ones(len(close), bool)
                for earlier in masks[:number]:
                    first &= (apart & np.uint64(earlier)) != 0
                one, other = order[hits[first]], order[hits[first] + step]
                a, b = np.minimum(one, other), np.maximum(one, other)
                agree = prints.agree(a, prints, b)
                yield a[agree], b[agree]
            agreeing = np.count_nonzero(same)
            if not agreeing:
                break
            if agreeing < len(rows) - len(rows) // 4:
                rows = rows[same]


def _apart(hashes: Words, rows: Ints, step: int) -> Words:
    """Return hashes[rows] ^ hashes[rows + step]; consecutive rows are sliced instead of gathered."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        low, high = int(rows[0]), int(rows[-1]) + 1
        return hashes[low:high] ^ hashes[low + step : high + step]
    return hashes[rows] ^ hashes[rows + step]


def _first_near(kept: _Prints, rows: _Prints) -> Ints:
    """Return for each of `rows` the first of `kept` that is near it, or -1."""
    count = max(len(kept), len(rows))
    nobody, bits = len(kept), block_bits(count)
    best = np.full(len(rows), nobody, np.int64)
    for mask in _masks(count, rows.distance):
        _meet_all(kept, rows, mask, bits, best)
    return np.where(best < nobody, best, -1)


def _meet_all(kept: _Prints, rows: _Prints, mask: int, bits: int, best: Ints) -> None:
    """Lower `best` of each of `rows` to the first of `kept` that is near and agrees on a mask."""
    of_kept, of_rows = blocks_of(kept.phash, mask, bits), blocks_of(rows.phash, mask, bits)

    def of_block(place: int) -> None:
        _meet(kept, of_kept[place], rows, of_rows[place], np.uint64(mask), best)  # no row is in two blocks

    list(in_threads(of_block, len(of_rows)))


def _meet(kept: _Prints, held: Ints, rows: _Prints, chosen: Ints, mask: np.uint64, best: Ints) -> None:
    """Lower `best` of the `chosen` rows to the first of the kept rows `held` that is near and agrees on a mask."""
    by = held[np.argsort(kept.phash[held] & mask)]
    order = chosen[np.argsort(rows.phash[chosen] & mask)]
    hashes = kept.phash[by]
    keys = hashes & mask
    for start in range(0, len(order), _CHUNK):
        at = order[start : start + _CHUNK]
        own = rows.phash[at]
        low, high = (np.searchsorted(keys, own & mask, side) for side in ("left", "right"))
        while len(at):
            more = low < high
            at, own, low, high = at[more], own[more], low[more], high[more]
            close = np.flatnonzero(np.bitwise_count(own ^ hashes[low]) <= rows.distance)
            hit, found = at[close], by[low[close]]
            agree = kept.agree(found, rows, hit)
            np.minimum.at(best, hit[agree], found[agree])
            low = low + 1


def _masks(n: int, distance: int) -> list[int]:
    """Return bit masks such that two hashes at most `distance` bits apart agree on all bits of at least one mask.

    At most `distance` of `count` bands can differ, so count - distance agree. More bands make more masks, and fewer of
    n hashes agree by chance: the count of least cost is chosen. For small n there is one empty mask (all pairs).

    >>> len(_masks(100, 4)), len(_masks(100_000, 4)), len(_masks(10_000_000, 4))
    (1, 5, 15)
    """
    counts = range(distance + 1, min(distance + 6, HASH_BITS) + 1)
    best = min([distance, *counts], key=lambda count: _cost(n, distance, count))
    bands = [sum(1 << bit for bit in range(band, HASH_BITS, best)) for band in range(best)]
    return [sum(chosen) for chosen in itertools.combinations(bands, best - distance)]


def _cost(n: int, distance: int, count: int) -> float:
    """Estimate the nanoseconds that comparing n random hashes takes with `count` bands."""
    sets = math.comb(count, distance)
    bits = HASH_BITS * (count - distance) / count if count else 0
    return sets * (200_000 + 100 * n + 3 * n * n / 2 ** (bits + 1))
