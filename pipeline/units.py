"""The unit map: units of work → each one's outputs committed exactly once. The one door to Ray Data.

    from_items(units) ─▶ prepare(unit) on CPU workers ─▶ model()(piece) on model workers ─▶ commit(unit, pieces), marker
                         yields bounded pieces           an actor pool; optional              in the driver

What every job may rely on:

- a committed unit (its marker exists) is never done again; of an uncommitted one nothing is visible to readers;
- `commit` may be repeated for a unit after a crash: it must give the same files again;
- pieces reach `commit` complete and in the order in which `prepare` yielded them, whatever the order of execution;
- an exception in prepare, model or commit fails only its unit, and so does a worker that dies (out of memory, a codec
  that crashes): the unit is tried `attempts` times in all, then quarantined with its reason. Ray by itself would retry
  a dying worker for ever; the tracker counts starts to bound that;
- a RecipeError raised anywhere ends the run at once: it is the user's to mend.

Layout: state/<job>/done/<unit>.json (the marker, written last) and state/<job>/quarantine/<unit>.json.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.config import Resources
from pipeline.errors import RecipeError
from pipeline.progress import Progress
from pipeline.storage import Storage

log = logging.getLogger(__name__)

Piece = dict[str, Any]

# A piece crosses Ray as one pickled column; so there are no null-typed or ragged columns for Arrow to stumble over.
# `error` is empty for a good piece; `data` of a piece with an error is a pickled RecipeError or empty.
_WIRE = pa.schema(
    [
        pa.field("unit", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("last", pa.bool_(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)
_BLOCK_BYTES = 1 << 20  # smaller pieces travel together; a larger one is handed on as soon as it is there
_REPORT_EVERY_S = 1.0
_GIB = 1 << 30


@dataclass(frozen=True)
class Unit:
    """A unit of work: an id that is a good file name, and what `prepare` needs to know, as plain JSON data."""

    id: str
    spec: dict[str, Any] = field(default_factory=dict)


class Job(ABC):
    """What is done to each unit. Instances are pickled to the workers, so they hold only settings and storages.

    `name` names the folder of markers, state/<name>/; `storage` is where that lies.
    """

    name: str
    storage: Storage

    @abstractmethod
    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """On a CPU worker: read, fetch, decode; yield pieces of at most some MB (encoded bytes, not arrays).

        Finished files may be published here under names that nothing lists until `commit`. May yield nothing.
        """

    def model(self) -> Callable[[Piece], Piece] | None:
        """Override to add a model stage: gives what is done to every piece, called once on each model worker.

        It may use `model_threads(resources)` CPU threads. Pieces come one by one: a piece is a batch.
        """
        return None

    @abstractmethod
    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        """In the driver: publish the unit's outputs. What it returns is kept in the marker, which is written next.

        Numbers are summed over units into `Summary.counts`; anything else that is JSON is kept in the marker only.
        """


@dataclass(frozen=True)
class Summary:
    """How a run ended: units done now, units found done, the quarantined ones with reasons, counts over all done."""

    done: int
    skipped: int
    quarantined: dict[str, str]
    counts: dict[str, float]


def markers(job: Job) -> dict[str, dict[str, Any]]:
    """What `commit` returned for every committed unit of this job, by unit id. One listing, then the markers."""
    folder = f"state/{job.name}/done"
    names = [name for name in job.storage.names(folder) if name.endswith(".json")]
    return {_unit_of(name): json.loads(job.storage.read(name)) for name in names}


def forget(job: Job, units: Iterable[str]) -> None:
    """Remove the markers of these units: they will be done again."""
    for unit in units:
        job.storage.delete(f"state/{job.name}/done/{unit}.json")


def report(counts: Mapping[str, float]) -> None:
    """From inside `prepare` or a model: counts for the progress display and for Prometheus. Elsewhere it does nothing.

    Names as in pipeline.progress: `samples`, `bytes`, `failed.<reason>`, or any other.
    """
    if _reporter is not None:
        _reporter.add(counts)


def model_threads(resources: Resources) -> int:
    """CPU threads that one model worker may use. Ray sets OMP_NUM_THREADS=1 in its workers; models set their own."""
    return max(1, _cpus(resources) // _model_workers(resources))


def run(job: Job, units: Iterable[Unit], resources: Resources, *, attempts: int = 3, progress: bool = True) -> Summary:
    """Do all `units` that have no marker yet. Starts Ray only if there is something to do.

    Bad units do not raise: they are in `Summary.quarantined`, and the caller ends with `Quarantined`.
    """
    units = list(units)
    wanted = {unit.id for unit in units}
    known = {unit: facts for unit, facts in markers(job).items() if unit in wanted}
    todo = [unit for unit in units if unit.id not in known]
    counts = Counter[str]()
    for facts in known.values():
        counts.update(_numbers(facts))
    if not todo:
        return Summary(0, len(known), {}, dict(counts))
    start_ray(resources)
    work = _Run(job, todo, resources, attempts)
    with Progress(job.name, len(units), already=len(known), poll=work.reported, enabled=progress) as bar:
        work.execute(bar)
    counts.update(work.counts)
    done = len(todo) - len(work.quarantined)
    return Summary(done, len(known), work.quarantined, dict(counts))


def start_ray(resources: Resources) -> None:
    """Start Ray in this process, quietly and on loopback only, unless it runs already. RAY_ADDRESS joins a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                num_cpus=_cpus(resources),
                num_gpus=resources.gpus,
                object_store_memory=min(_GIB, max(_GIB // 8, _memory_bytes() // 12)),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    _quieten()


def _quieten() -> None:
    """Ray Data tells its story on the terminal by default; ours is told by pipeline.progress."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


class _Run:
    """One call of `run`: rounds over the units that are left, until none is."""

    def __init__(self, job: Job, todo: list[Unit], resources: Resources, attempts: int) -> None:
        import ray

        self.job, self.todo, self.resources, self.attempts = job, todo, resources, attempts
        self.counts = Counter[str]()
        self.quarantined: dict[str, str] = {}
        tracker = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Tracker)
        self.tracker = tracker.remote(job.name)

    def execute(self, bar: Progress) -> None:
        left = self.todo
        while left:
            failed = self._round(left, bar)
            starts = self._ask(self.tracker.starts.remote(list(failed)))
            left = []
            for unit in (unit for unit in self.todo if unit.id in failed):
                reason = failed[unit.id]
                log.warning("%s: unit %s failed: %s", self.job.name, unit.id, reason.partition("\n")[0])
                if starts.get(unit.id, 0) >= self.attempts:
                    self._quarantine(unit, reason)
                    bar.advance(counts={"quarantined": 1})
                else:
                    left.append(unit)
            if left:
                time.sleep(1.0)  # what fails at once, on a busy disk or server, may heal in a moment

    def reported(self) -> dict[str, float]:
        """Counts that workers reported so far, for the display."""
        try:
            return dict(self._ask(self.tracker.counts.remote()))
        except Exception:  # noqa: BLE001 - the display must never stop the work
            return {}

    @staticmethod
    def _ask(reference: Any) -> Any:
        import ray

        return ray.get(reference, timeout=60)

    def _round(self, units: list[Unit], bar: Progress) -> dict[str, str]:
        """Run `units` once; gives unit id → reason for those that were not committed."""
        by_id = {unit.id: unit for unit in units}
        gathered: dict[str, _Gathered] = {unit.id: _Gathered() for unit in units}
        failed: dict[str, str] = {}
        for row in self._stream(units):
            unit, state = by_id[row["unit"]], gathered.get(row["unit"])
            if state is None or row["unit"] in failed:
                continue  # a late piece of a unit whose fate is known
            if row["error"]:
                _raise_if_fatal(row["data"])
                failed[unit.id] = row["error"]
            elif (pieces := state.add(row)) is not None:
                del gathered[unit.id]
                if reason := self._commit(unit, pieces):
                    failed[unit.id] = reason
                else:
                    bar.advance()
        for lost in gathered.keys() - failed.keys():
            failed[lost] = "incomplete: its worker died while it was being read"
        return failed

    def _stream(self, units: list[Unit]) -> Iterator[dict[str, Any]]:
        """The wire rows of all pieces, in the order in which they come."""
        import ray.data

        rows = [{"unit": json.dumps({"id": unit.id, "spec": unit.spec})} for unit in units]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset.context.target_max_block_size = _BLOCK_BYTES
        dataset = dataset.map_batches(
            _Prepare(self.job, self.tracker, self.attempts),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
        )
        if type(self.job).model is not Job.model:
            workers = _model_workers(self.resources)
            dataset = dataset.map_batches(
                _Model,
                fn_constructor_args=(self.job, self.tracker, self.attempts),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
                num_cpus=0,  # unlike prepare's, so that Ray Data does not fuse the two stages
                num_gpus=_gpus() / workers if _gpus() else None,
            )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()

    def _commit(self, unit: Unit, pieces: list[Piece]) -> str:
        """Publish the unit and its marker; gives the reason if that failed."""
        try:
            facts = self.job.commit(unit, pieces)
            marker = json.dumps(facts, sort_keys=True).encode()
            self.job.storage.write(f"state/{self.job.name}/done/{unit.id}.json", marker)
            self.job.storage.delete(f"state/{self.job.name}/quarantine/{unit.id}.json")
        except RecipeError:
            raise
        except Exception as error:  # noqa: BLE001 - a unit that cannot be published fails alone
            return _reason(error)
        self.counts.update(_numbers(facts))
        return ""

    def _quarantine(self, unit: Unit, reason: str) -> None:
        self.quarantined[unit.id] = reason.partition("\n")[0]
        record = {"unit": unit.id, "spec": unit.spec, "attempts": self.attempts, "reason": reason}
        self.job.storage.write(f"state/{self.job.name}/quarantine/{unit.id}.json", json.dumps(record).encode())


class _Gathered:
    """The pieces of one unit, until its last one and all before it have come."""

    def __init__(self) -> None:
        self.pieces: dict[int, Piece] = {}
        self.expected: int | None = None

    def add(self, row: Mapping[str, Any]) -> list[Piece] | None:
        """Take a wire row; gives all pieces in order once they are complete. The last row is an empty end mark."""
        if row["last"]:
            self.expected = row["index"]
        else:
            self.pieces[row["index"]] = pickle.loads(row["data"])
        if self.expected is None or len(self.pieces) < self.expected:
            return None
        return [self.pieces[index] for index in range(self.expected)]


# On the workers ------------------------------------------------------------------------------------------------------


class _Tracker:
    """A small actor that outlives workers: how often each piece of work was started, and what was reported."""

    def __init__(self, job: str) -> None:
        from ray.util.metrics import Counter as Metric

        self._starts, self._counts, self._job = Counter[str](), Counter[str](), job
        self._metric = Metric("capstan_reported", "What units reported, by name", tag_keys=("job", "name"))

    def begin(self, item: str) -> int:
        self._starts[item] += 1
        return self._starts[item]

    def starts(self, items: list[str]) -> dict[str, int]:
        return {item: self._starts[item] for item in items}

    def add(self, counts: dict[str, float]) -> None:
        self._counts.update(counts)
        for name, value in counts.items():
            if value > 0:
                self._metric.inc(value, {"job": self._job, "name": name})

    def counts(self) -> dict[str, float]:
        return dict(self._counts)


class _Reporter:
    """Gathers counts in a worker and sends them on about once a second."""

    def __init__(self, tracker: Any) -> None:
        self._tracker, self._pending, self._sent = tracker, Counter[str](), time.monotonic()

    def add(self, counts: Mapping[str, float]) -> None:
        self._pending.update(counts)
        if time.monotonic() - self._sent >= _REPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self._tracker.add.remote(dict(self._pending))
        self._pending, self._sent = Counter(), time.monotonic()


_reporter: _Reporter | None = None  # of the unit that this worker is at


def _begin(tracker: Any, item: str, attempts: int) -> str:
    """Count a start of `item`; gives a reason not to if it has killed its worker too often."""
    global _reporter
    import ray

    if ray.get(tracker.begin.remote(item)) > attempts:
        return f"died: its worker ended {attempts} times without an exception (out of memory, or a crash in a library)"
    _reporter = _Reporter(tracker)
    return ""


class _Prepare:
    """The first stage: a table of units → wire rows of their pieces."""

    def __init__(self, job: Job, tracker: Any, attempts: int) -> None:
        self.job, self.tracker, self.attempts = job, tracker, attempts

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for text in table["unit"].to_pylist():
            yield from self._unit(Unit(**json.loads(text)))

    def _unit(self, unit: Unit) -> Iterator[pa.Table]:
        if reason := _begin(self.tracker, unit.id, self.attempts):
            yield _row(unit.id, error=reason)
            return
        index = 0
        try:
            for piece in self.job.prepare(unit):
                yield _row(unit.id, index, data=pickle.dumps(piece, pickle.HIGHEST_PROTOCOL))
                index += 1
        except Exception as error:  # noqa: BLE001 - the unit boundary: a bad unit is a row with a reason
            yield _failure(unit.id, error)
        else:
            yield _row(unit.id, index, last=True)
        finally:
            if _reporter is not None:
                _reporter.flush()


class _Model:
    """The second stage, an actor: wire rows → wire rows. The model is made when the first piece comes, so that a model
    that kills its worker while loading is bounded like any other piece of work."""

    def __init__(self, job: Job, tracker: Any, attempts: int) -> None:
        self.job, self.tracker, self.attempts = job, tracker, attempts
        self.apply: Callable[[Piece], Piece] | None = None

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in table.to_pylist():
            yield self._piece(row) if not (row["error"] or row["last"]) else table

    def _piece(self, row: dict[str, Any]) -> pa.Table:
        unit, index = row["unit"], row["index"]
        if reason := _begin(self.tracker, f"{unit}#{index}", self.attempts):
            return _row(unit, error=reason)
        try:
            if self.apply is None:
                self.apply = self.job.model()
                assert self.apply is not None, f"{self.job.name} overrides model(), which gives None"
            piece = self.apply(pickle.loads(row["data"]))
            return _row(unit, index, data=pickle.dumps(piece, pickle.HIGHEST_PROTOCOL))
        except Exception as error:  # noqa: BLE001 - the unit boundary: a bad piece is a row with a reason
            return _failure(unit, error)
        finally:
            if _reporter is not None:
                _reporter.flush()


def _row(unit: str, index: int = 0, *, last: bool = False, error: str = "", data: bytes = b"") -> pa.Table:
    return pa.table([[unit], [index], [last], [error], [data]], schema=_WIRE)


def _failure(unit: str, error: Exception) -> pa.Table:
    fatal = pickle.dumps(error) if isinstance(error, RecipeError) else b""
    return _row(unit, error=_reason(error), data=fatal)


def _reason(error: Exception) -> str:
    """Type and message on the first line, the traceback below."""
    first = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{first}\n{''.join(traceback.format_exception(error))}"


def _raise_if_fatal(data: bytes) -> None:
    if data:
        raise pickle.loads(data)


def _numbers(facts: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in facts.items() if isinstance(value, int | float)}


def _unit_of(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".json")


def _cpus(resources: Resources) -> int:
    return resources.cpus or len(os.sched_getaffinity(0))


def _gpus() -> float:
    import ray

    return float(ray.cluster_resources().get("GPU", 0))


def _model_workers(resources: Resources) -> int:
    return resources.model_workers or max(1, resources.gpus or 0)


def _memory_bytes() -> int:
    """Memory of this machine, or of this container where that is less."""
    from ray._common.utils import get_system_memory

    return int(get_system_memory())
