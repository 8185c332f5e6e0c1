"""A vector → the rows nearest to it: compared with all up to a million, by a graph (usearch) beyond"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from capstan.pipeline import extras
from capstan.pipeline.similar.vectors import Vectors

EXACT: Final = 1_000_000  # rows that are all compared
_PIECE: Final = 16_384  # rows converted to float32 at a time
_ADDED: Final = 20_000  # rows added to a graph between two reports

Query = npt.NDArray[np.float32]
Found = list[tuple[int, float]]  # row and cosine, the nearest first


class Nearest:
    """Finds rows among `vectors`. `prepare` must have returned before `find` is asked."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.exact = len(vectors.rows) <= EXACT
        self._graph: Any = None

    def prepare(self, said: Callable[[float], None] = lambda _: None) -> None:
        """Open the graph of a large dataset, and build it if it is not there. Raises MissingExtra without usearch."""
        if self.exact or self._graph is not None:
            return
        extras.require("similar", "more than a million embeddings")
        from usearch.index import Index

        if not self.vectors.graph.exists():
            _build(self.vectors, self.vectors.graph, said)
        self._graph = Index.restore(str(self.vectors.graph), view=True)

    def find(self, query: Query, count: int) -> Found:
        """Return the `count` rows nearest to a vector. Rows without an embedding are never found."""
        query = query / max(float(np.linalg.norm(query)), 1e-12)
        if self.exact:
            return _compare(self.vectors.rows, query.astype(np.float32), count)
        found = self._graph.search(query.astype(np.float32), count, threads=1)
        return [(int(row), 1.0 - float(apart)) for row, apart in zip(found.keys, found.distances, strict=True)]


def _compare(rows: npt.NDArray[np.float16], query: Query, count: int) -> Found:
    def best(start: int) -> tuple[npt.NDArray[np.int64], Query]:
        piece = rows[start : start + _PIECE].astype(np.float32)
        cosines = piece @ query
        cosines[~piece.any(axis=1)] = -np.inf  # a row without an embedding
        first = np.argpartition(-cosines, min(count, len(cosines)) - 1)[:count]
        return first + start, cosines[first]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = list(pool.map(best, range(0, len(rows), _PIECE)))
    if not parts:
        return []
    places, cosines = (np.concatenate(values) for values in zip(*parts, strict=True))
    order = np.lexsort((places, -cosines))[:count]
    return [(int(places[n]), float(cosines[n])) for n in order if np.isfinite(cosines[n])]


def _build(vectors: Vectors, file: Path, said: Callable[[float], None]) -> None:
    from usearch.index import Index

    graph = Index(ndim=vectors.rows.shape[1], metric="cos", dtype="f16")
    for start in range(0, len(vectors.rows), _ADDED):
        piece = np.asarray(vectors.rows[start : start + _ADDED])
        there = np.flatnonzero(piece.any(axis=1))
        graph.add((there + start).astype(np.uint64), piece[there], threads=len(os.sched_getaffinity(0)))
        said(min(1.0, (start + _ADDED) / len(vectors.rows)))
    partial = file.with_name(f".partial-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        graph.save(str(partial))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
