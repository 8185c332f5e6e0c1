"""Rows of new batches → the kept rows of earlier ones that they repeat, without deciding any earlier row again

    state/duplicates/meet-new            files and hashes of some new rows, while a selection lasts
    state/duplicates/meet-<number>       what they repeat among the rows of some runs (kept_runs)

The new rows meet each run on its own, on workers if the runs are many. Only the new rows are sorted. What comes out is
what comparing all rows with each other would give, since earlier batches come first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Manifest
from capstan.pipeline.dataset.sorted_runs import HASH, rows_between, rows_with
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.image.phash import COLOUR_BYTES
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.select import kept_runs
from capstan.pipeline.select.arrays.equal_rows import first_equal
from capstan.pipeline.select.arrays.large_arrays import Ints, filled
from capstan.pipeline.select.arrays.saved import Arrays, load, save
from capstan.pipeline.select.hash_pairs import Few, Prints, matches, rows_of_few
from capstan.pipeline.select.kept_runs import FOLDER, Table, hashes_of, raw
from capstan.pipeline.select.near_duplicates import Earlier
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Unit, done_here, results

log = logging.getLogger(__name__)

MEETING: Final = f"{FOLDER}/meet-"  # how files of a selection begin
_NEW: Final = f"{MEETING}new"
_NEW_ROWS: Final = 1_000_000  # that meet the runs together
_UNIT_ROWS: Final = 500_000  # that a worker compares with the new rows at a time


class KeptRows:
    """The kept rows of a dataset, for the rows of new batches to meet (decide.Earlier).

    `units` are those of the dataset, in order; `keys` are 16 raw bytes each.
    """

    def __init__(
        self, recipe: Recipe, storage: Storage, manifest: Manifest, units: Sequence[Staged], *, progress: bool = True
    ) -> None:
        self.shards, self.keys = len(manifest.shards), np.zeros(0, "S16")
        self._recipe, self._storage, self._progress = recipe, storage, progress
        self._work = _units(kept_runs.listed(storage, manifest, units))

    def meet(
        self,
        sha256: npt.NDArray[np.bytes_],
        phash: npt.NDArray[np.uint64],
        colours: npt.NDArray[np.uint8] | None,
        hashed: npt.NDArray[np.bool_] | None,
    ) -> Earlier:
        """Return which of the rows `keys` each new row repeats. Arguments are those of `find_duplicates`."""
        n, dedup = len(phash), self._recipe.dedup
        found, keys = Earlier(filled(n, -1, np.int64), filled(n, -1, np.int64)), [self.keys]
        if dedup.exact or dedup.perceptual is not None:
            rows = _NEW_ROWS if dedup.perceptual is None else rows_of_few(min(n, _NEW_ROWS), dedup.perceptual)
            for start in range(0, n, max(rows, 1)):
                own = slice(start, min(start + rows, n))
                alone = None if colours is None else colours[own]
                self._meet(found, own, keys, sha256[own], phash[own], alone, None if hashed is None else hashed[own])
        self.keys = np.concatenate(keys)
        return found

    def _meet(
        self,
        found: Earlier,
        own: slice,
        keys: list[npt.NDArray[np.bytes_]],
        sha256: npt.NDArray[np.bytes_],
        phash: npt.NDArray[np.uint64],
        colours: npt.NDArray[np.uint8] | None,
        hashed: npt.NDArray[np.bool_] | None,
    ) -> None:
        """Add to `found` what some new rows repeat, and to `keys` the keys of these."""
        new: Arrays = {"sha256": sha256}
        rows = np.arange(len(phash)) if hashed is None else np.flatnonzero(hashed)
        if (distance := self._recipe.dedup.perceptual) is not None:
            prints = Prints(phash[rows], None if colours is None else colours[rows], distance, 0)
            first = first_equal(prints.words, np.arange(len(rows)))
            alone = np.flatnonzero(first == np.arange(len(rows)))  # equal rows meet the same
            new |= {"phash": prints.phash[alone]}
            new |= {} if prints.colours is None else {"colours": prints.colours[alone]}
        met = self._run(new)
        known = sum(map(len, keys))
        found.exact[own.start + met["exact"]] = known + np.arange(len(met["exact"]))
        keys.append(met["exact root"])
        if distance is not None:
            # The first in order of precedence: batch, then area, then place.
            by = np.lexsort((*(met[name] for name in ("rank", "number", "smallness", "batch", "near")),))
            one = by[np.flatnonzero(np.diff(met["near"][by], prepend=-1))]
            keys.append(met["near root"][one])
            number = np.full(len(alone), -1, np.int64)
            number[met["near"][one]] = known + len(met["exact"]) + np.arange(len(one))
            place = np.full(len(rows), -1, np.int64)
            place[alone] = number
            found.near[own.start + rows] = place[first]

    def _run(self, new: Arrays) -> Arrays:
        """Return what is found in all runs together."""
        dedup = self._recipe.dedup
        try:
            place = save(self._storage, _NEW, new)
            job = _Meet(
                self._storage, place, dedup.exact, dedup.perceptual, dedup.colours or 0, self._recipe.image.check
            )
            if done_here(self._work):  # for all its threads; workers open it themselves
                job.open()
            done = results(job, self._work, self._recipe.resources, progress=self._progress)
            found = list(ahead(lambda facts: load(self._storage, **facts), done))
        finally:
            self._storage.delete(_NEW, *(unit.spec["file"] for unit in self._work))
        return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def _units(groups: Iterable[tuple[str, list[Table]]]) -> list[Unit]:
    """Return runs, or groups of tables that have none, as units of half a million rows."""
    made, rows = list[list[dict[str, Any]]](), _UNIT_ROWS
    for number, (run, tables) in enumerate(groups):
        if rows >= _UNIT_ROWS:
            made.append([])
            rows = 0
        rows += sum(one.rows for one in tables)
        batch = int(tables[0].unit.partition("-")[0])
        made[-1].append({"run": run, "tables": [one.plain for one in tables], "batch": batch, "number": number})
    return [
        Unit(f"{number:09d}", {"parts": parts, "file": f"{MEETING}{number:09d}"}) for number, parts in enumerate(made)
    ]


class _Meet(Job):
    """The job in which new rows meet runs. A unit of it has some runs."""

    name, title = "select-meet", "select: kept rows"

    def __init__(
        self, storage: Storage, new: dict[str, Any], exact: bool, distance: int | None, tolerance: int, check: str
    ) -> None:
        self.storage, self._new, self._exact = storage, new, exact
        self._distance, self._tolerance, self._check = distance, tolerance, check
        self._opened: tuple[Arrays, Ints, npt.NDArray[np.uint64], Few | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    def open(self) -> tuple[Arrays, Ints, npt.NDArray[np.uint64], Few | None]:
        """Return the new rows: their values, their order by hash, and the hashes in this order; and for near ones."""
        if self._opened is None:
            new = load(self.storage, **self._new)
            hashes = hashes_of(new["sha256"])
            order, few = np.argsort(hashes, kind="stable"), None
            if self._distance is not None:
                few = Few(Prints(new["phash"], new.get("colours"), self._distance, self._tolerance))
            self._opened = new, order, hashes[order], few
        return self._opened

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Publish what new rows repeat; yield one piece: where it is."""
        found = [self._met(**part) for part in unit.spec["parts"]]
        yield save(self.storage, unit.spec["file"], {n: np.concatenate([one[n] for one in found]) for n in found[0]})

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts

    def _met(self, run: str, tables: list[list[str]], batch: int, number: int) -> Arrays:
        """Return new rows and the roots of the rows that they repeat, with the precedence of near ones."""
        new, order, hashes, few = self.open()
        rows = self._rows(run, tables, hashes)
        own = rows[HASH.name].to_numpy()
        sums, roots = raw(rows["sha256"], "S32"), raw(rows["root"], "S16")
        pairs = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        if self._exact:
            low, high = (np.searchsorted(hashes, own, side) for side in ("left", "right"))
            pairs += [(left, order[right]) for left, right in matches(low, high)]
        left, right = map(np.concatenate, zip(*pairs, strict=True))
        same = sums[left] == new["sha256"][right]
        met: Arrays = {"exact": right[same], "exact root": roots[left[same]]}
        if few is None:
            return met
        kept = np.flatnonzero(rows["kept"].to_numpy())
        phash, area, rank = (rows[name].to_numpy()[kept] for name in ("phash", "area", "rank"))
        if self._check != "full":  # images without a hash have 0
            kept, phash, area, rank = (values[phash != 0] for values in (kept, phash, area, rank))
        by = np.lexsort((rank, -area))
        colours = raw(rows["colours"], np.uint8).reshape(-1, COLOUR_BYTES)[kept[by]] if "colours" in new else None
        near = few.first_near(Prints(phash[by], colours, self._distance or 0, self._tolerance))
        hit = np.flatnonzero(near >= 0)
        first = by[near[hit]]
        order_of = {"smallness": -area[first], "rank": rank[first]}
        order_of |= {"batch": np.full(len(hit), batch), "number": np.full(len(hit), number)}
        return met | {"near": hit, "near root": roots[kept[first]]} | order_of

    def _rows(self, run: str, tables: list[list[str]], hashes: npt.NDArray[np.uint64]) -> pa.Table:
        """Return the rows of a run that new ones may repeat; of the ledger's tables if there is no such run."""
        if run:
            name = kept_runs.file_of(run)
            try:
                if self._distance is None:
                    rows = rows_with(self.storage, name, hashes)
                else:
                    rows = rows_between(self.storage, name, 0, 1 << 64)
                made = (rows.schema.metadata or {}).get(kept_runs.MADE)
                if made == run.encode() and rows.schema.equals(kept_runs.SCHEMA):
                    return rows
                raise DamagedFile(self.storage.path(name), "it is another run")
            except (DamagedFile, FileNotFoundError) as error:
                log.warning("%s: the ledger's tables are read", error)
        return kept_runs.rows_of(self.storage, tables)
