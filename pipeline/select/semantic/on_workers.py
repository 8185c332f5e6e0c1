"""Semantic repeats of more embeddings than one machine should hold: they stay on workers

    sample     some units' embeddings → those from which centres are made, by the process that decides
    assign     some units' embeddings → the nearest centre of each, and the embeddings by buckets of clusters
    compare    the embeddings of a bucket → the rows of its clusters that repeat another

What the process that decides holds of a row is its place, and the row that it repeats; and 32 bytes for each bucket in
each group of units, which is less than one byte per row. The outcome is that of one process (`clusters`), whatever the
number of workers: units are grouped by their rows, and every product is computed in pieces of fixed size. Only a row
that is as near to two centres as rounding can tell may be in the other cluster.

    state/columns/values/semantic-…       files between the steps, gone with the selection
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from capstan.pipeline.config import Resources
from capstan.pipeline.errors import DamagedFile, Quarantined
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.score.store import vectors_of
from capstan.pipeline.select.arrays.apart import NOTHING, Apart
from capstan.pipeline.select.arrays.large_arrays import Ints, empty, filled, pieces, release
from capstan.pipeline.select.arrays.saved import SCRATCH, Arrays, load, save
from capstan.pipeline.select.semantic.clusters import Search, centres_of, closest, in_pieces, sampled, steps
from capstan.pipeline.select.semantic.clusters import unit as _unit
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Unit, run_once, why_failed

GROUP_ROWS: Final = 100_000  # whose embeddings a worker reads at a time
_BUCKET_ROWS: Final = 250_000  # whose embeddings a worker compares at a time, about
MOST_HERE: Final = 64  # groups; the embeddings of no more than these are compared by one process
ON_CLUSTER: Final = 16  # the same, if RAY_ADDRESS names a cluster
_FOLDER: Final = f"{SCRATCH}/semantic"

Half = npt.NDArray[np.float16]


@dataclass(frozen=True)
class VectorFiles:
    """The vectors that a scorer kept, in the files of units."""

    storage: Storage
    units: Sequence[Staged]
    scorer: str
    resources: Resources
    progress: bool = True

    @property
    def many(self) -> bool:
        """Whether they are so many that workers should compare them."""
        most = ON_CLUSTER if os.environ.get("RAY_ADDRESS") else MOST_HERE
        return sum(unit.rows for unit in self.units) > most * GROUP_ROWS

    def find(self, order: Ints, threshold: float, *, first: int, apart: Apart = NOTHING) -> Ints:
        """Return what `find_semantic` returns. `order` lists rows of all units, by precedence.

        Raises DamagedFile, or CapstanError if workers kept failing.
        """
        if not len(order):
            return filled(0, -1, np.int64)
        try:
            return _Steps(self, threshold, first or len(order), apart).find(order)
        finally:
            self.storage.delete(*(name for name in self.storage.names(SCRATCH) if name.startswith(_FOLDER)))


class _Steps:
    """A search of some rows, in steps on workers."""

    def __init__(self, vectors: VectorFiles, threshold: float, first: int, apart: Apart) -> None:
        self._vectors, self._threshold, self._first, self._apart = vectors, threshold, first, apart
        self._storage = vectors.storage
        self._k, self._at_once = steps(first)

    def find(self, order: Ints) -> Ints:
        groups = self._groups(order)
        centres = save(self._storage, f"{_FOLDER}-centres", {"centres": self._centres(groups)})
        buckets = min(-(-len(order) // _BUCKET_ROWS), self._at_once)
        work = [Unit(group.id, {**group.spec, "centres": centres, "buckets": buckets}) for group in groups]
        parts = self._run(_Assign(self._vectors), work)
        together = {facts["alone"] for facts in parts if facts["rows"]}
        deeper = self._k > self._at_once and (len(together) > 1 or -1 in together)
        given: dict[str, Any] = {"threshold": self._threshold, "first": self._first, "n": len(order), "deeper": deeper}
        given["dim"] = max(facts["dim"] for facts in parts)
        given["apart"] = save(self._storage, f"{_FOLDER}-apart", {"pairs": self._apart.pairs})
        work = [Unit(f"{number:09d}", {**given, "sections": file}) for number, file in self._buckets(parts, buckets)]
        near = filled(len(order), -1, np.int64)
        for found in ahead(lambda facts: load(self._storage, **facts), self._run(_Compare(self._vectors), work)):
            near[found["place"]] = found["near"]
        return release(near)

    def _buckets(self, parts: Sequence[dict[str, Any]], buckets: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of each bucket, and a file: where its rows are in the file of each group."""
        sections = empty(len(parts) * buckets, np.zeros((0, 4), np.int64)).reshape(len(parts), buckets, 4)
        for number, own in enumerate(ahead(lambda facts: load(self._storage, **facts["sections"]), parts)):
            sections[number] = own["sections"]
        for number in range(buckets):
            yield number, save(self._storage, f"{_FOLDER}-sections-{number:09d}", {"sections": sections[:, number]})

    def _run(self, job: Job, work: Sequence[Unit]) -> list[dict[str, Any]]:
        try:
            return run_once(job, work, self._vectors.resources, progress=self._vectors.progress)
        except Quarantined as bad:
            raise why_failed(job, work, bad) from bad

    def _groups(self, order: Ints) -> list[Unit]:
        """Return a unit for each group of units, with a file: its rows that are compared, and their places."""
        place = filled(sum(unit.rows for unit in self._vectors.units), -1, np.int64)
        for piece in pieces(len(order)):
            place[order[piece]] = np.arange(piece.start, piece.stop)
        chosen, made, start = sampled(self._first, self._at_once), list[Unit](), 0
        for number, group in enumerate(_grouped(self._vectors.units)):
            own = place[start : start + sum(unit.rows for unit in group)]
            rows = np.flatnonzero(own >= 0)
            arrays = {"rows": rows, "places": own[rows], "chosen": np.isin(own[rows], chosen)}
            file = save(self._storage, f"{_FOLDER}-rows-{number:09d}", arrays)
            listed = [[unit.unit, unit.table, unit.rows, dict(unit.scores)] for unit in group]
            made.append(Unit(f"{number:09d}", {"units": listed, "file": file, "rows": len(rows)}))
            start += len(own)
        release(place)
        return made

    def _centres(self, groups: Sequence[Unit]) -> npt.NDArray[np.float32]:
        """Return the centres of the first step."""
        if self._at_once == 1:
            return np.zeros((1, 1), np.float32)
        done = self._run(_Sample(self._vectors), groups)
        found = [load(self._storage, **facts)["vectors"] for facts in done]
        dim = max(vectors.shape[1] for vectors in found)  # 0 in a group without embeddings
        found = [vectors if vectors.shape[1] else np.zeros((len(vectors), dim), np.float16) for vectors in found]
        with threadpool_limits(1), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            sample = np.concatenate([_unit(rows) for rows in in_pieces(np.concatenate(found))])
            return centres_of(sample, self._at_once, pool)


def _grouped(units: Sequence[Staged]) -> Iterator[list[Staged]]:
    """Yield neighbouring units, of `GROUP_ROWS` rows or a little more."""
    held, rows = list[Staged](), 0
    for one in units:
        held.append(one)
        rows += one.rows
        if rows >= GROUP_ROWS:
            yield held
            held, rows = [], 0
    if held:
        yield held


# On workers ----------------------------------------------------------------------------------------------------------


class _Step(Job):
    """A step of the search. What a unit of it yields is kept in its marker."""

    def __init__(self, vectors: VectorFiles) -> None:
        self.storage, self._scorer = vectors.storage, vectors.scorer

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts

    def _read(self, spec: Mapping[str, Any]) -> tuple[Half, Arrays]:
        """Return the embeddings of a group, zeros for rows without one, and which rows are compared."""
        units = [Staged(name, table, "", rows, tuple(scores.items())) for name, table, rows, scores in spec["units"]]
        blocks = list(ahead(lambda one: vectors_of(self.storage, one, self._scorer), units))
        dim = max(block.shape[1] for block in blocks if block is not None) if any(b is not None for b in blocks) else 0
        whole = [
            np.zeros((one.rows, dim), np.float16) if block is None else block
            for one, block in zip(units, blocks, strict=True)
        ]
        return np.concatenate(whole), load(self.storage, **spec["file"])


class _Sample(_Step):
    """The job that reads the embeddings from which centres are made."""

    name, title = "semantic-sample", "semantic: sample"

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        vectors, own = self._read(unit.spec)
        chosen = vectors[own["rows"][own["chosen"]]]
        yield save(self.storage, f"{_FOLDER}-sample-{unit.id}", {"vectors": chosen})


class _Assign(_Step):
    """The job that finds the nearest centre of each row."""

    name, title = "semantic-assign", "semantic: assign"

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Publish places, clusters and embeddings by bucket, and the start, end, rows and CRC-32 of each bucket."""
        vectors, own = self._read(unit.spec)
        centres, rows = load(self.storage, **unit.spec["centres"])["centres"], own["rows"]
        nearest = np.zeros(len(rows), np.int64)
        with threadpool_limits(1):
            if len(centres) > 1 and vectors.shape[1]:
                found = [closest(_unit(vectors[piece]), centres) for piece in in_pieces(rows)]
                nearest = np.concatenate([nearest[:0], *found])
        bucket = nearest * unit.spec["buckets"] // len(centres)
        by = np.argsort(bucket, kind="stable")
        bounds = np.searchsorted(bucket[by], np.arange(unit.spec["buckets"] + 1))
        start, sections, written = 0, list[tuple[int, int, int, int]](), list[bytes]()
        for low, high in itertools.pairwise(bounds.tolist()):
            chosen = by[low:high]
            data = own["places"][chosen].tobytes() + nearest[chosen].tobytes() + vectors[rows[chosen]].tobytes()
            written.append(data)
            sections.append((start, start + len(data), high - low, zlib.crc32(data)))
            start += len(data)
        self.storage.write(f"{_FOLDER}-assigned-{unit.id}", b"".join(written))
        places = save(self.storage, f"{_FOLDER}-places-{unit.id}", {"sections": np.array(sections, np.int64)})
        alone = int(nearest[0]) if len(rows) and (nearest == nearest[0]).all() else -1
        yield {"sections": places, "alone": alone, "rows": len(rows), "dim": vectors.shape[1]}


class _Compare(_Step):
    """The job that compares the rows of each cluster. A unit of it is a bucket of clusters."""

    name, title = "semantic-compare", "semantic: compare"

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Publish the rows of the bucket that repeat another, by their places; yield where they are."""
        spec = unit.spec
        sections = load(self.storage, **spec["sections"])["sections"]
        rows, dim = int(sections[:, 2].sum()), spec["dim"]
        places, nearest = empty(rows, np.int64), empty(rows, np.int64)
        vectors = empty(rows, np.zeros((0, dim), np.float16))
        start = 0
        for group, (first, last, count, crc32) in enumerate(sections.tolist()):
            data, stop = self._section(f"{_FOLDER}-assigned-{group:09d}", first, last, crc32), start + count
            places[start:stop] = np.frombuffer(data, np.int64, count)
            nearest[start:stop] = np.frombuffer(data, np.int64, count, 8 * count)
            vectors[start:stop] = 0  # of a group without embeddings
            if len(data) > 16 * count:
                vectors[start:stop] = np.frombuffer(data, np.float16, offset=16 * count).reshape(-1, dim)
            start = stop
        order = np.argsort(places)
        places, near = places[order], np.full(rows, -1, np.int64)
        pairs = load(self.storage, **spec["apart"])["pairs"]
        apart = Apart.of(spec["n"], pairs).take(places)
        by = np.argsort(nearest[order], kind="stable")
        clusters = np.split(by, np.flatnonzero(np.diff(nearest[order][by])) + 1) if rows else []
        with threadpool_limits(1), ThreadPoolExecutor(1) as pool:
            search = Search(vectors, order, spec["threshold"], apart, pool)
            if spec["deeper"]:
                for own in clusters:
                    search.compare(own, int(np.searchsorted(places[own], spec["first"])), near)
            else:
                search.within(clusters, near)
        hit = np.flatnonzero(near >= 0)
        found = {"place": places[hit], "near": places[near[hit]]}
        yield save(self.storage, f"{_FOLDER}-found-{unit.id}", found)

    def _section(self, name: str, start: int, stop: int, crc32: int) -> bytes:
        data = self.storage.read_range(name, start, stop) if stop > start else b""
        if zlib.crc32(data) != crc32:
            raise DamagedFile(self.storage.path(name), "its CRC-32 is not that of what was written", "run it again")
        return data
