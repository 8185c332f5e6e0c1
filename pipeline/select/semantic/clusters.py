"""Clusters of embeddings, and the rows of each that repeat another (SemDeDup)

SemDeDup: Abbas et al. 2023. All pairs of a million images would take half a trillion products. Similar images are
almost always in the same k-means cluster, so only those are compared: the only pairs missed are those that a border
separates.

The number of clusters grows in proportion to the rows. Comparing each row with all centres would take time in
proportion to the square of the rows, so more than `MOST_CLUSTERS` are made in two steps or more: the first makes as
many as the square root of their number, and each of these is clustered by itself.

Clusters are computed from the first batch alone, in order of precedence, so that a new batch changes no earlier
decision. Every product is computed in one thread and in pieces of fixed size; threads work on different clusters. The
outcome therefore does not depend on the number of cores.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from capstan.pipeline.select.arrays.apart import NOTHING, Apart
from capstan.pipeline.select.arrays.large_arrays import (
    Ints,
    empty,
    filled,
    numbered,
    pieces,
    release,
    taken,
)
from capstan.pipeline.select.arrays.partitions import scattered

CLUSTER_ROWS: Final = 1000  # rows of the first batch per cluster, on average
_TRAINED_ON: Final = 64  # rows per cluster in the sample for k-means
MOST_CLUSTERS: Final = 4096  # that are made at once
_ROUNDS: Final = 8  # of k-means
_PIECE: Final = 4096  # rows converted to float32 at a time

Floats = npt.NDArray[np.float32]


def find_semantic(
    embeddings: npt.NDArray[np.float16], order: Ints, threshold: float, *, first: int, apart: Apart = NOTHING
) -> Ints:
    """Return for each position of `order` the position of the first kept row that it repeats, or -1.

    `order` lists rows of `embeddings` [n, d] by precedence. A row repeats an earlier row of its cluster if their cosine
    is `threshold` or more. The first `first` positions are those of the first batch. A row of zeros (no embedding)
    repeats nothing. `embeddings` may be a memory map: it is read in pieces. Positions that are `apart` do not repeat
    each other.
    """
    near = filled(len(order), -1, np.int64)
    with threadpool_limits(1), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        if len(order):
            Search(embeddings, order, threshold, apart, pool).compare(numbered(len(order)), first or len(order), near)
    return release(near)


@dataclass(frozen=True)
class Search:
    """The arguments of `find_semantic`, and the threads."""

    embeddings: npt.NDArray[np.float16]
    order: Ints
    threshold: float
    apart: Apart
    pool: ThreadPoolExecutor

    def compare(self, places: Ints, first: int, near: Ints) -> None:
        """Set `near` of some positions of `order`, of which the first `first` are of the first batch."""
        k, at_once = steps(first)
        clusters = self._split(places, first, at_once) if k > 1 else [places]
        if k > at_once and len(clusters) > 1:
            for own in clusters:
                self.compare(own, int(np.searchsorted(own, places[first - 1], "right")), near)
            return
        self.within(clusters, near)

    def within(self, clusters: Sequence[Ints], near: Ints) -> None:
        """Set `near` of the positions of clusters, by comparing those of each."""

        def of_cluster(own: Ints) -> Ints:
            return _first_kept(self.embeddings, self.order[own], self.threshold, self.apart.take(own).pairs.tolist())

        for own, found in zip(clusters, self.pool.map(of_cluster, clusters), strict=True):
            near[own] = np.where(found >= 0, own[found], -1)
        release(self.embeddings)

    def _split(self, places: Ints, first: int, k: int) -> list[Ints]:
        """Return the positions by cluster, of which there are `k` or, as some are empty, fewer."""
        order, nearest = taken(self.order, places), empty(len(places), np.uint16)
        centres = _centres(self.embeddings, order[:first], k, self.pool)
        for piece in pieces(len(order)):
            rows = in_pieces(order[piece])
            found = self.pool.map(lambda own: closest(unit(self.embeddings[own]), centres), rows)
            nearest[piece] = np.concatenate(list(found))
            release(self.embeddings)
        clusters = scattered([places], lambda piece: nearest[piece], k)
        return [own for (own,) in clusters if len(own)]


def unit(rows: npt.NDArray[np.floating]) -> Floats:
    """Convert rows [n, d] to float32 of length 1; zeros stay zeros."""
    wide = rows.astype(np.float32)
    length = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    return np.asarray(wide / np.maximum(length, 1e-12)[:, None], np.float32)


def steps(first: int) -> tuple[int, int]:
    """Return how many clusters `first` rows make in all, and how many of these in the first step."""
    k = max(first // CLUSTER_ROWS, 1)
    return k, k if k <= MOST_CLUSTERS else math.isqrt(k)


def sampled(first: int, k: int) -> Ints:
    """Return the places of an even sample of `first` rows, from which `k` centres are made."""
    return np.linspace(0, first - 1, min(first, k * _TRAINED_ON)).astype(np.int64)


def _centres(embeddings: npt.NDArray[np.float16], order: Ints, k: int, pool: ThreadPoolExecutor) -> Floats:
    """Run spherical k-means over an even sample of `order`: float32 [k, d], of length 1."""
    chosen = np.sort(order[sampled(len(order), k)])
    return centres_of(np.concatenate([unit(embeddings[rows]) for rows in in_pieces(chosen)]), k, pool)


def centres_of(sample: Floats, k: int, pool: ThreadPoolExecutor) -> Floats:
    """Run spherical k-means over rows of length 1: float32 [k, d], of length 1."""
    centres = sample[np.linspace(0, len(sample) - 1, k).astype(np.int64)]
    for _ in range(_ROUNDS if k > 1 else 0):
        nearest = np.concatenate(list(pool.map(closest, in_pieces(sample), itertools.repeat(centres))))
        by = np.argsort(nearest, kind="stable")
        there, starts = np.unique(nearest[by], return_index=True)
        centres = centres.copy()
        centres[there] = np.add.reduceat(sample[by], starts, axis=0)
        centres = unit(centres)  # an empty cluster stays where it is
    return centres


def closest(rows: Floats, centres: Floats) -> Ints:
    """Return the number of the centre that is closest to each row."""
    return np.asarray((rows @ centres.T).argmax(axis=1), np.int64)


def in_pieces(rows: npt.NDArray) -> Iterator[npt.NDArray]:
    """Yield the rows some thousands at a time."""
    return (rows[start : start + _PIECE] for start in range(0, len(rows), _PIECE))


def _first_kept(
    embeddings: npt.NDArray[np.float16], rows: Ints, threshold: float, apart: Sequence[tuple[int, int]]
) -> Ints:
    """Return for each of a cluster's rows, in order of precedence, the first kept row before it that is near, or -1.

    Each piece is compared with the rows kept so far, and its remaining rows with each other. `apart` are pairs of
    places in `rows`.
    """
    near = np.full(len(rows), -1, np.int64)
    kept: list[int] = []
    held = np.empty((0, embeddings.shape[1]), np.float32)
    for start in range(0, len(rows), _PIECE // 4):
        own = unit(embeddings[rows[start : start + _PIECE // 4]])
        if len(held):
            close = own @ held.T >= threshold
            _part(close, range(start, start + len(own)), kept, apart)
            hit = close.any(axis=1)
            near[start : start + len(own)] = np.where(hit, np.array(kept)[close.argmax(axis=1)], -1)
        (left,) = np.nonzero(near[start : start + len(own)] < 0)
        close = own[left] @ own[left].T >= threshold
        _part(close, (start + left).tolist(), (start + left).tolist(), apart)
        alone = np.ones(len(left), bool)
        for row in np.flatnonzero(np.tril(close, -1).any(axis=1)).tolist():  # the others are near nothing before them
            before = np.flatnonzero(close[row, :row] & alone[:row])
            if len(before):
                near[start + left[row]] = start + left[before[0]]
                alone[row] = False
        kept += (start + left[alone]).tolist()
        held = np.concatenate([held, own[left[alone]]])
    return near


def _part(
    close: npt.NDArray[np.bool_], rows: Sequence[int], columns: Sequence[int], apart: Sequence[tuple[int, int]]
) -> None:
    """Clear `close` [rows, columns] where a row and a column are apart."""
    if not apart:
        return
    row, column = ({place: number for number, place in enumerate(places)} for places in (rows, columns))
    for one, other in [*apart, *((b, a) for a, b in apart)]:
        if one in row and other in column:
            close[row[one], column[other]] = False
