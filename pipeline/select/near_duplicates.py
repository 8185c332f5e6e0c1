"""Find exact repeats (SHA-256) and near repeats (perceptual hash).

Rows are visited in one order of precedence: earlier batch first (packed samples stay), then larger image, then smaller
key. A row is a duplicate if a kept row before it is identical, or near (see hash_pairs). New rows never displace old
ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from capstan.pipeline.select.arrays.apart import NOTHING, Apart
from capstan.pipeline.select.arrays.equal_rows import as_words, decide_equal, first_equal
from capstan.pipeline.select.arrays.large_arrays import (
    Ints,
    Rows,
    filled,
    joined,
    made_of,
    numbered,
    numbers,
    pieces,
    release,
    which,
)
from capstan.pipeline.select.arrays.partitions import PART_ROWS, ascending
from capstan.pipeline.select.hash_pairs import Bytes, Prints, Words, first_kept, first_near

NONE, EXACT, PERCEPTUAL, SEMANTIC, CONTAMINATED, COPIES = range(6)
REASONS: Final = ("", "exact", "perceptual", "semantic", "contaminated", "copies")


@dataclass(frozen=True)
class Duplicates:
    """For each of n rows: the index of the kept row that it repeats, or -1; and how (EXACT, …; NONE)."""

    kept: Ints  # [n]
    kind: npt.NDArray[np.int8]  # [n]

    @property
    def exact(self) -> npt.NDArray[np.bool_]:
        """Mask [n] of rows whose file is identical to a kept one."""
        return self.kind == EXACT


@dataclass(frozen=True)
class Earlier:
    """Kept rows of earlier batches, by number, that n rows repeat: by an identical file, and by a near hash; or -1."""

    exact: Ints  # [n]
    near: Ints  # [n]


def precedence(batch: Ints, area: Ints, key: npt.NDArray[np.bytes_] | None = None) -> Ints:
    """Return row indices [n] by precedence. `area` is the source's, in pixels.

    Without `key`, rows of a batch must be in the order of their keys.
    """
    n = len(batch)
    if key is not None:
        return np.lexsort((key, -area, batch))
    if n <= PART_ROWS:
        return np.lexsort((-area, batch))
    smallest = made_of(n, lambda piece: -area[piece], np.int64)
    rows = numbered(n)
    return cast(Ints, joined(ascending([batch, smallest, rows]), np.int64))


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
    earlier: Earlier | None = None,
) -> Duplicates:
    """Find the rows that repeat another.

    `order` [n] is their precedence; `sha256` is text, or words [n, w]. `distance` is in bits of `phash` (None: no near
    duplicates). `colours` [n, bytes], if given, must then agree too, within `tolerance`. Pairs that are `apart` do not
    repeat each other. `hashed` [n] masks the rows whose `phash` is known (None: all). In the result, n + number stands
    for a row that is `earlier`; none of these is apart from any.
    """
    n = len(order)
    kept = _exact(order, sha256, apart, near=distance is not None) if exact else filled(n, -1, np.int64)
    kind = made_of(n, lambda piece: np.where(kept[piece] >= 0, EXACT, NONE), np.int8)
    if distance is not None:

        def undecided(rows: Ints) -> npt.NDArray[np.bool_]:
            left = (kept[rows] < 0) & (True if hashed is None else hashed[rows])
            return np.asarray(left if earlier is None else left & (earlier.exact[rows] < 0) & (earlier.near[rows] < 0))

        ordered = (order[piece] for piece in pieces(n))
        left = joined((rows[undecided(rows)] for rows in ordered), np.int64)
        release(order, kept)
        near = _near(Prints(phash, colours, distance, tolerance, None, apart).take(left))
        settle(kept, kind, left, near, PERCEPTUAL)
    if earlier is not None:
        _add_earlier(kept, kind, earlier)
    if exact and distance is not None and len(apart.codes):
        found = which(n, lambda piece: kind[piece] == PERCEPTUAL)
        for piece in pieces(len(found)):
            rows = found[piece]
            same = (as_words(sha256[rows]) == as_words(sha256[kept[rows]])).all(axis=1)
            kind[rows[same]] = EXACT
    return Duplicates(kept, kind)


def _add_earlier(kept: Ints, kind: npt.NDArray[np.int8], earlier: Earlier) -> None:
    """Let rows repeat those that are earlier, and so do the rows that repeat them."""
    n = len(kept)
    for piece in pieces(n):
        exact, near = earlier.exact[piece], earlier.near[piece]
        close = (kept[piece] < 0) & (exact < 0) & (near >= 0)
        kept[piece] = np.where(exact >= 0, n + exact, np.where(close, n + near, kept[piece]))
        kind[piece] = np.where(exact >= 0, EXACT, np.where(close, PERCEPTUAL, kind[piece]))
    for piece in pieces(n):
        rows = piece.start + np.flatnonzero((kept[piece] >= 0) & (kept[piece] < n))
        root = kept[kept[rows]]
        kept[rows] = np.where(root >= 0, root, kept[rows])
    release(kept, kind)


def _exact(order: Ints, sha256: npt.NDArray[np.bytes_] | Words, apart: Apart, *, near: bool) -> Ints:
    """Return for each row the first with the same SHA-256, or -1.

    If rows are compared by their hashes as well (`near`), those of pairs are left to that search, which asks about each
    pair.
    """

    def words(rows: Rows) -> list[Words]:
        own = [apart.alone(numbers(rows))] if near and len(apart.codes) else []
        return [*as_words(sha256[rows]).T, *own]

    first = first_equal(words, order)
    kept = made_of(len(order), lambda piece: np.where(first[piece] != numbers(piece), first[piece], -1), np.int64)
    if len(apart.codes) and not near:
        decide_equal(kept, first, order, apart)
    return cast(Ints, kept)


def settle(kept: Ints, kind: npt.NDArray[np.int8], left: Ints, near: Ints, reason: int, apart: Apart = NOTHING) -> Ints:
    """Record that row left[i] repeats left[near[i]] (-1: none).

    Rows that repeated a row which is no longer kept now repeat the row which that one repeats. Return those that are
    `apart` from it.
    """
    before = which(len(kept), lambda piece: kept[piece] >= 0)
    for piece in pieces(len(left)):
        rows, own = left[piece], near[piece]
        kept[rows] = np.where(own >= 0, left[own], -1)
        kind[rows[own >= 0]] = reason
    free = [np.zeros(0, np.int64)]
    for piece in pieces(len(before)):
        rows = before[piece]
        root = kept[kept[rows]]
        kept[rows] = np.where(root >= 0, root, kept[rows])
        free.append(rows[apart.has(rows, kept[rows])])
    release(kept, kind, left, near, before)
    return np.concatenate(free)


def near_reference(
    reference: tuple[Words, Bytes | None], phash: Words, colours: Bytes | None, distance: int, tolerance: int
) -> Ints:
    """Return for each row the first of `reference` (hashes, colours) that is near it, or -1."""
    return first_near(Prints(*reference, distance, tolerance), Prints(phash, colours, distance, tolerance))


def _near(prints: Prints) -> Ints:
    """Return for each row, in order of precedence, the first kept row near it; -1 for those kept.

    Rows with equal hashes and colours get the same result, so only the first of each is compared.
    """
    n = len(prints)
    rows = numbered(n)
    first = first_equal(prints.words, rows)
    unique = which(n, lambda piece: first[piece] == rows[piece])
    found = first_kept(prints if len(unique) == n else prints.take(unique))
    fate = filled(n, -1, np.int64)
    for piece in pieces(len(unique)):
        own = found[piece]
        fate[unique[piece]] = np.where(own >= 0, unique[own], -1)
    del unique, found
    for piece in pieces(n):
        own = first[piece]
        repeats = own != rows[piece]
        fate[piece] = np.where(repeats, np.where(fate[own] >= 0, fate[own], own), fate[piece])
    return cast(Ints, release(fate, first, rows))
