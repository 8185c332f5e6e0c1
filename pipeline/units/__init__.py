"""The unit map: run units on Ray, commit each one exactly once

    from_items(units) ─▶ prepare(unit) on CPU workers ─▶ model()(piece) on model workers ─▶ commit(unit, pieces), marker
                         yields bounded pieces           an actor pool; optional              in the driver

This is the only module that imports Ray Data. What every job may rely on:

- a committed unit (see markers.py) is never done again; nothing of an uncommitted one is visible to readers;
- `commit` may be repeated for a unit after a crash: it must publish the same files again;
- pieces reach `commit` complete and in the order in which `prepare` yielded them, whatever the order of execution;
- an exception in prepare, model or commit fails only its unit, and so does a worker that dies (out of memory, a codec
  that crashes): the unit is tried `attempts` times in all, then quarantined with its reason. Ray by itself would retry
  a dying worker for ever; the tracker counts starts to bound that;
- a RecipeError raised anywhere ends the run at once: only the user can fix it;
- a storage that does not answer, or a full disk, ends the run too: nothing can be committed there, and the same command
  resumes where it stopped. If only one object cannot be read, only its unit fails.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capstan.pipeline.config import Resources
from capstan.pipeline.errors import CapstanError, DiskFull, RecipeError, StorageError, first_line
from capstan.pipeline.progress import Progress
from capstan.pipeline.units.job import Job, Piece, Unit, report
from capstan.pipeline.units.markers import MarkerLog
from capstan.pipeline.units.workers import Model, Prepare, Tracker, reason_of

log = logging.getLogger(__name__)

__all__ = ["Job", "MarkerLog", "Piece", "Summary", "Unit", "model_threads", "report", "run", "start_ray"]

_BLOCK_BYTES = 1 << 20  # smaller pieces travel together; a larger one is passed on at once
_GIB = 1 << 30
_CORE_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] \S+\.cc:\d+:")  # as Ray's C++ core writes them


@dataclass(frozen=True)
class Summary:
    """How a run ended: units done now, units done before, quarantined units with reasons, counts over all done."""

    done: int
    skipped: int
    quarantined: dict[str, str]
    counts: dict[str, float]


def model_threads(resources: Resources) -> int:
    """Return the CPU threads that one model worker may use.

    Ray sets OMP_NUM_THREADS=1 in its workers; models set their own.
    """
    return max(1, _cpus(resources) // _model_workers(resources))


def run(
    job: Job,
    units: Iterable[Unit],
    resources: Resources,
    *,
    redo: Collection[str] = (),
    attempts: int = 3,
    progress: bool = True,
) -> Summary:
    """Do all `units` that have no marker yet. Start Ray only if there is something to do.

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
    start_ray(resources)
    work = _Run(job, todo, resources, attempts)
    with Progress(
        job.title or job.name,
        len(units),
        already=len(known),
        samples=sum(unit.spec.get("rows", 0) for unit in todo),
        poll=work.reported,
        enabled=progress,
    ) as bar:
        work.execute(bar)
    for facts in work.committed.values():
        counts.update(_numbers(facts))
    for unit in work.quarantined.keys() & found.keys():
        counts.update(_numbers(found[unit]))
    job.markers.gather(work.committed)
    return Summary(len(work.committed), len(known), work.quarantined, dict(counts))


def start_ray(resources: Resources) -> None:
    """Start Ray in this process, quietly and on loopback only, unless it runs already. RAY_ADDRESS joins a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # see _without_core_lines
    if not os.environ.get("RAY_ADDRESS"):
        # Ray's only switch that keeps a one-machine Ray off the network (the default on the systems in its name).
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray
    from ray._private import worker

    worker._worker_logs_enabled = False  # else Ray reports dead nodes on stdout, which is for the summary
    if not ray.is_initialized():
        on_sigterm = signal.getsignal(signal.SIGTERM)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not os.environ.get("RAY_ADDRESS"):
            _check_free(resources.metrics_port)
            options |= {
                "address": "local",
                "num_cpus": _cpus(resources),
                "num_gpus": resources.gpus,
                "object_store_memory": min(_GIB, max(_GIB // 8, _memory_bytes() // 12)),
                "include_dashboard": False,
                "_metrics_export_port": resources.metrics_port,
            }
        with _without_core_lines():
            ray.init(**options)
        if threading.current_thread() is threading.main_thread() and on_sigterm is not None:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end the process before it could save
    _configure()


@contextlib.contextmanager
def _without_core_lines() -> Iterator[None]:
    """Hold stderr back while Ray starts, and drop the lines of its C++ core.

    The core writes to the file descriptor, past Python. A log level of fatal silences it but for one line, which says
    that the level was set.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not _CORE_LINE.match(line):
                    os.write(2, line)


def _check_free(port: int | None) -> None:
    """Raise RecipeError if the port is taken. Ray would start without its exporter and not report it."""
    if port is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                problem = f"cannot listen on port {port} ({error.strerror})"
                raise RecipeError("resources.metrics_port", problem, "set a free port") from None


def _configure() -> None:
    """Silence Ray Data's own progress output; pipeline.progress replaces it."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a unit may yield its one piece at its end, after hours
    logging.getLogger("ray.data").setLevel(logging.ERROR)


class _Run:
    """One call of `run`: rounds over the units that are left, until none are."""

    def __init__(self, job: Job, todo: list[Unit], resources: Resources, attempts: int) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.job, self.todo, self.resources, self.attempts = job, todo, resources, attempts
        self.committed: dict[str, dict[str, Any]] = {}
        self.quarantined: dict[str, str] = {}
        self._once_bad = job.markers.noted()
        # On the driver's node, so that its counts are not lost with another node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        tracker = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Tracker)
        self.tracker = tracker.remote(job.name)

    def execute(self, bar: Progress) -> None:
        left = self.todo
        while left:
            failed = self._round(left, bar)
            starts = self._get(self.tracker.starts.remote(list(failed)))
            left = []
            for unit in (unit for unit in self.todo if unit.id in failed):
                reason = failed[unit.id]
                log.warning("%s: unit %s failed: %s", self.job.name, unit.id, first_line(reason))
                if starts.get(unit.id, 0) >= self.attempts:
                    self._quarantine(unit, reason)
                    self.tracker.ended.remote("quarantined")
                    bar.advance(counts={"quarantined": 1})
                else:
                    self.tracker.ended.remote("retried")
                    left.append(unit)
            if left:
                time.sleep(1.0)  # a busy disk or server may recover in a moment

    def reported(self) -> dict[str, float]:
        """Return the counts that workers have reported so far, for the display."""
        from ray.exceptions import RayError

        try:
            return dict(self._get(self.tracker.counts.remote()))
        except RayError as error:  # a slow or lost tracker must not stop the work; the display stays as it was
            log.debug("%s: no counts for the display: %s", self.job.name, first_line(str(error)))
            return {}

    @staticmethod
    def _get(reference: Any) -> Any:
        import ray

        return ray.get(reference, timeout=60)

    def _round(self, units: list[Unit], bar: Progress) -> dict[str, str]:
        """Run `units` once; return unit id → reason for those that were not committed."""
        by_id = {unit.id: unit for unit in units}
        gathered: dict[str, _Gathered] = {unit.id: _Gathered() for unit in units}
        failed: dict[str, str] = {}
        for row in self._stream(units):
            unit, state = by_id[row["unit"]], gathered.get(row["unit"])
            if state is None or row["unit"] in failed:
                continue  # a late piece of a unit that has ended
            if row["error"]:
                self._raise_if_fatal(pickle.loads(row["data"]) if row["data"] else None)
                failed[unit.id] = row["error"]
            elif (pieces := state.add(row)) is not None:
                del gathered[unit.id]
                if reason := self._commit(unit, pieces):
                    failed[unit.id] = reason
                else:
                    self.tracker.ended.remote("committed")
                    bar.advance()
        for lost in gathered.keys() - failed.keys():
            failed[lost] = "incomplete: its worker died while it was being read"
        return failed

    def _stream(self, units: list[Unit]) -> Iterator[dict[str, Any]]:
        """Yield the wire rows of all pieces, in the order in which they arrive."""
        import ray.data

        rows = [{"unit": json.dumps({"id": unit.id, "spec": unit.spec})} for unit in units]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset.context.target_max_block_size = _BLOCK_BYTES
        dataset = dataset.map_batches(
            Prepare(self.job, self.tracker, self.attempts, str(Path.cwd())),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
        )
        if type(self.job).model is not Job.model:
            gpus = _gpus(self.resources)
            workers = self.resources.model_workers or max(1, int(gpus))
            dataset = dataset.map_batches(
                Model,
                fn_constructor_args=(self.job, self.tracker, self.attempts, str(Path.cwd())),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
                num_cpus=0,  # unlike prepare's, so that Ray Data does not fuse the two stages
                # An actor runs on one node: by default it requests at most one GPU.
                num_gpus=self.job.gpus_per_worker or min(1.0, gpus / workers) or None,
            )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()

    def _commit(self, unit: Unit, pieces: list[Piece]) -> str:
        """Publish the unit and its marker; return the reason if that failed, else ""."""
        try:
            facts = self.job.commit(unit, pieces)
            self.job.markers.mark(unit.id, facts)
            if unit.id in self._once_bad:
                self.job.markers.release(unit.id)
        except Exception as error:  # noqa: BLE001 - a unit that cannot be published fails alone
            self._raise_if_fatal(error)
            return reason_of(error)
        self.committed[unit.id] = facts
        return ""

    def _raise_if_fatal(self, error: Exception | None) -> None:
        """Raise `error` again if no further attempt can succeed."""
        if isinstance(error, RecipeError | DiskFull):
            raise error
        if isinstance(error, StorageError):
            try:
                self.job.storage.check_writable()
            except CapstanError:
                raise error from None  # it names the object, and every other unit would fail the same way

    def _quarantine(self, unit: Unit, reason: str) -> None:
        self.quarantined[unit.id] = first_line(reason)
        self._once_bad.add(unit.id)
        self.job.markers.quarantine(unit.id, unit.spec, self.attempts, reason)


class _Gathered:
    """The pieces of one unit, until all of them have arrived."""

    def __init__(self) -> None:
        self.pieces: dict[int, Piece] = {}
        self.expected: int | None = None

    def add(self, row: Mapping[str, Any]) -> list[Piece] | None:
        """Add a wire row; return all pieces in order once they are complete. The last row is an empty end mark."""
        if row["last"]:
            self.expected = row["index"]
        else:
            self.pieces[row["index"]] = pickle.loads(row["data"])
        if self.expected is None or len(self.pieces) < self.expected:
            return None
        return [self.pieces[index] for index in range(self.expected)]


def _numbers(facts: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in facts.items() if isinstance(value, int | float)}


def _cpus(resources: Resources) -> int:
    return resources.cpus or len(os.sched_getaffinity(0))


def _gpus(resources: Resources) -> float:
    """Return the GPUs for the model workers: the recipe's number (an autoscaler may yet start them), or all."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0) if resources.gpus is None else resources.gpus)


def _model_workers(resources: Resources) -> int:
    return resources.model_workers or max(1, resources.gpus or 0)


def _memory_bytes() -> int:
    """Return the memory of this machine, or of this container if that is less."""
    from ray._common.utils import get_system_memory

    return int(get_system_memory())
