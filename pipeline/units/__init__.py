"""The unit map: run units on workers, commit each one exactly once

    units ─▶ prepare(unit) ─▶ model()(piece) ─▶ commit(unit, pieces) ─▶ marker
             a CPU worker     model workers,    the same CPU worker     the driver
             yields pieces    optional

Only how a unit ended travels to the driver, so that neither its memory nor its work grows with the data. Workers are
processes of this machine if little is left to do (there, the driver commits), else Ray's (see `_on_ray`). What every
job may rely on:

- a committed unit (see markers.py) is never done again; nothing of an uncommitted one is visible to readers;
- `commit` may be repeated for a unit after a crash: it must publish the same files again;
- pieces reach `commit` complete and in the order in which `prepare` yielded them, whatever the order of execution;
- an exception in prepare, model or commit fails only its unit, and so does a worker that dies (out of memory, a codec
  that crashes): the unit is tried `attempts` times in all, then quarantined with its reason;
- a RecipeError raised anywhere ends the run at once: only the user can fix it;
- a storage that does not answer, or a full disk, ends the run too: nothing can be committed there, and the same command
  resumes where it stopped. If only one object cannot be read, only its unit fails.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from capstan.pipeline.config import Resources
from capstan.pipeline.errors import CapstanError, DiskFull, Quarantined, RecipeError, StorageError, first_line
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.progress import Progress
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units.job import Job, Piece, Unit, report
from capstan.pipeline.units.markers import MarkerLog
from capstan.pipeline.units.on_processes import ProcessWorkers
from capstan.pipeline.units.on_ray import RayWorkers
from capstan.pipeline.units.ray_session import count_nodes, start_ray
from capstan.pipeline.units.shared import shared
from capstan.pipeline.units.workers import Ended, has_model, reason_of

log = logging.getLogger(__name__)

__all__ = [
    "Job",
    "MarkerLog",
    "Piece",
    "Summary",
    "Unit",
    "done_here",
    "model_threads",
    "report",
    "results",
    "run",
    "run_once",
    "shared",
    "start_ray",
    "why_failed",
]

SMALL_RUN: Final = 64  # units: no more run without Ray


class Workers(Protocol):
    """The workers of one run, wherever they are."""

    def stream(self, units: Sequence[Unit]) -> Iterator[list[Ended]]:
        """Commit the units; yield how they ended, those together that end at the same time."""

    def starts(self, items: Sequence[str]) -> dict[str, int]:
        """Return how often each of the items was started."""

    def ended(self, outcome: str, units: Sequence[str]) -> None:
        """Count units that are `committed`, `quarantined`, or will be `retried`."""

    def reported(self) -> dict[str, float]:
        """Return the counts that workers have reported so far, for the display."""

    def close(self) -> None:
        """End the workers' part in this run, also if it is interrupted."""


@dataclass(frozen=True)
class Summary:
    """How a run ended: units done now, units done before, quarantined units with reasons, counts over all done."""

    done: int
    skipped: int
    quarantined: dict[str, str]
    counts: dict[str, float]


def model_threads(resources: Resources) -> int:
    """Return the CPU threads that one model worker may use: its share of the cores of its node.

    Workers have OMP_NUM_THREADS=1; models set their own.
    """
    cpus = resources.cpus or len(os.sched_getaffinity(0))
    workers = resources.model_workers or max(1, resources.gpus or 0)
    here = math.ceil(workers / count_nodes()) if ray_runs_here() else workers
    return max(1, cpus // here)


def run(
    job: Job,
    units: Iterable[Unit],
    resources: Resources,
    *,
    redo: Collection[str] = (),
    attempts: int = 3,
    progress: bool = True,
) -> Summary:
    """Do all `units` that have no marker yet. Start workers only if there is something to do.

    Units whose ids are in `redo` are done although they have a marker. It is replaced once they are done; until then,
    and if they fail, the previous outputs stay valid.
    Bad units do not raise: they are in `Summary.quarantined`, and the caller ends with `Quarantined`.
    """
    units = list(units)
    wanted = {unit.id for unit in units}
    job.storage.sweep()
    found = {unit: facts for unit, facts in job.markers.gather().items() if unit in wanted}
    known = {unit: facts for unit, facts in found.items() if unit not in redo}
    todo = [unit for unit in units if unit.id not in known]
    counts = Counter[str]()
    for facts in known.values():
        counts.update(_numbers(facts))
    if not todo:
        return Summary(0, len(known), {}, dict(counts))
    work = _Run(job, todo, resources, attempts, found.keys())
    with (
        contextlib.closing(work.workers),
        Progress(
            job.title or job.name,
            len(units),
            already=len(known),
            samples=sum(unit.spec.get("rows", 0) for unit in todo),
            poll=work.workers.reported,
            enabled=progress,
        ) as bar,
    ):
        work.execute(bar)
    for facts in work.committed.values():
        counts.update(_numbers(facts))
    for unit in work.quarantined.keys() & found.keys():
        counts.update(_numbers(found[unit]))
    job.markers.gather(work.committed)
    return Summary(len(work.committed), len(known), work.quarantined, dict(counts))


def run_once(job: Job, units: Sequence[Unit], resources: Resources, *, progress: bool = True) -> list[dict[str, Any]]:
    """Do units whose results are of use in this run only; return what `commit` returned for each, in order.

    Nothing is kept of earlier runs, nor is it noted that the units are done. Raises Quarantined if some kept failing.
    """
    job.markers.clear()
    summary = run(job, units, resources, progress=progress)
    done = job.markers.read()
    job.markers.clear()
    if summary.quarantined:
        raise Quarantined(job.title or job.name, summary.quarantined)
    return [done[unit.id] for unit in units]


def results(job: Job, units: Sequence[Unit], resources: Resources, *, progress: bool = True) -> list[dict[str, Any]]:
    """Return what `commit` returned for each unit, in order: `run_once`, but for few units with what costs least.

    If at most `SMALL_RUN` units are to be done and RAY_ADDRESS names no cluster, threads of this process do them: no
    worker starts. An error of a unit is raised there as it is; on workers, which try a unit again, `why_failed` says
    why units kept failing. Markers are kept in this machine's scratch space while the units run.
    """
    if not units:
        return []
    if not done_here(units):
        with scratch() as folder:
            job.state = Storage(str(folder))
            try:
                return run_once(job, units, resources, progress=progress)
            except Quarantined as bad:
                raise why_failed(job, units, bad) from bad
    done, samples = list[dict[str, Any]](), sum(unit.spec.get("rows", 0) for unit in units)
    with Progress(job.title or job.name, len(units), samples=samples, enabled=progress) as bar:
        for facts in ahead(lambda unit: job.commit(unit, list(job.prepare(unit))), units):
            done.append(facts)
            bar.advance(counts=_numbers(facts))
    return done


def done_here(units: Sequence[Unit]) -> bool:
    """Return whether `results` does these units by threads of this process."""
    return len(units) <= SMALL_RUN and not os.environ.get("RAY_ADDRESS")


def why_failed(job: Job, units: Sequence[Unit], bad: Quarantined) -> CapstanError:
    """Return the error that one of the units that kept failing is due to.

    If that is a damaged file, the unit is done in this process, for an error that names the file and the fix.
    """
    name, reason = min(bad.units.items())
    if " is damaged (" in reason:  # no other unit is done here: it might end this process as it ended workers
        try:
            list(job.prepare(next(unit for unit in units if unit.id == name)))
        except CapstanError as error:
            return error
    return CapstanError(f"{bad.job}: {len(bad.units)} unit(s) failed, e.g. {name}: {reason}")


def _on_ray(job: Job, units: Sequence[Unit], resources: Resources) -> bool:
    """Return whether these units run on Ray.

    By `resources.executor`; if that is `auto`, on Ray if RAY_ADDRESS names a cluster or Ray runs in this process
    already, if a model stage may use GPUs, if `resources.metrics_port` asks for Ray's exporter, or if more than
    `SMALL_RUN` units are left.
    """
    if resources.executor != "auto":
        return resources.executor == "ray"
    running = bool(os.environ.get("RAY_ADDRESS")) or ray_runs_here()
    gpus = has_model(job) and (has_gpu() if resources.gpus is None else resources.gpus > 0)
    return running or gpus or resources.metrics_port is not None or len(units) > SMALL_RUN


def ray_runs_here() -> bool:
    """Return whether this process has started Ray or joined a cluster."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def has_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU; cheap, unlike asking torch."""
    return Path("/dev/nvidia0").exists()


class _Run:
    """One call of `run`: rounds over the units that are left, until none are."""

    def __init__(self, job: Job, todo: list[Unit], resources: Resources, attempts: int, found: Collection[str]) -> None:
        self._found = found  # units that were committed before
        self.job, self.todo, self.attempts = job, todo, attempts
        self.committed: dict[str, dict[str, Any]] = {}
        self.quarantined: dict[str, str] = {}
        self._once_bad = job.markers.noted()
        workers = RayWorkers if _on_ray(job, todo, resources) else ProcessWorkers
        self.workers: Workers = workers(job, resources, attempts)

    def execute(self, bar: Progress) -> None:
        left = self.todo
        while left:
            failed = self._round(left, bar)
            starts = self.workers.starts(list(failed))
            left = []
            for unit in (unit for unit in self.todo if unit.id in failed):
                reason = failed[unit.id]
                log.warning("%s: unit %s failed: %s", self.job.name, unit.id, first_line(reason))
                if starts.get(unit.id, 0) >= self.attempts:
                    self._quarantine(unit, reason)
                    self.workers.ended("quarantined", [unit.id])
                    bar.advance(counts={"quarantined": 1})
                else:
                    self.workers.ended("retried", [unit.id])
                    left.append(unit)
            if left:
                time.sleep(1.0)  # a busy disk or server may recover in a moment

    def _round(self, units: list[Unit], bar: Progress) -> dict[str, str]:
        """Run `units` once; return unit id → reason for those that were not committed."""
        failed = {unit.id: "incomplete: its worker died while it was being read" for unit in units}
        for batch in self.workers.stream(units):
            for ended in batch:
                if ended.error:
                    self._raise_if_fatal(pickle.loads(ended.data) if ended.data else None)
                    failed[ended.unit] = ended.error
            committed = {ended.unit: ended.facts for ended in batch if not ended.error}
            if reason := self._mark(committed):
                failed |= dict.fromkeys(committed, reason)
                continue
            for unit in committed:
                del failed[unit]
                bar.advance()
            self.workers.ended("committed", list(committed))
        return failed

    def _mark(self, committed: dict[str, dict[str, Any]]) -> str:
        """Publish the markers of these units; return the reason if that failed, else ""."""
        try:
            self.job.markers.mark_all(committed, again=self._found)
            for unit in committed.keys() & self._once_bad:
                self.job.markers.release(unit)
        except Exception as error:  # noqa: BLE001 - units that cannot be marked are done again
            self._raise_if_fatal(error)
            return reason_of(error)
        self.committed |= committed
        return ""

    def _raise_if_fatal(self, error: Exception | None) -> None:
        """Raise `error` again if no further attempt can succeed."""
        if isinstance(error, RecipeError | DiskFull):
            raise error
        if isinstance(error, StorageError):
            try:
                self.job.check_storage()
            except CapstanError:
                raise error from None  # it names the object, and every other unit would fail the same way

    def _quarantine(self, unit: Unit, reason: str) -> None:
        self.quarantined[unit.id] = first_line(reason)
        self._once_bad.add(unit.id)
        self.job.markers.quarantine(unit.id, unit.spec, self.attempts, reason)


def _numbers(facts: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in facts.items() if isinstance(value, int | float)}
