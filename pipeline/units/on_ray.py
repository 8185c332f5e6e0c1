"""The unit map's workers on Ray: one machine or a cluster

    driver ─▶ a task for each unit: prepare, have the model applied, commit ─▶ driver: how the unit ended
                       │  ▲
                pieces ▼  │ outputs
              actors that hold the model

Pieces and outputs go from worker to worker. A task is never repeated by Ray itself, which would retry one that kills
its worker for ever; the tracker counts starts to bound that.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from capstan.pipeline.config import Resources
from capstan.pipeline.errors import first_line
from capstan.pipeline.units.job import Job, Unit
from capstan.pipeline.units.ray_session import start_ray
from capstan.pipeline.units.shared import hash_of, set_shared
from capstan.pipeline.units.workers import (
    Ended,
    Model,
    Prepare,
    Wire,
    commits,
    has_model,
    item_of,
    reason_of,
    stand_in,
)

log = logging.getLogger(__name__)

_WAITING_TASKS: Final = 64  # at least: more than are running, so that an autoscaler sees what is left
_LOOK_EVERY_S: Final = 5.0  # at how many CPUs and GPUs the cluster has, and at which model workers there are
_CPUS_A_SHARE: Final = 64  # an actor answers about 1,400 calls a second, a worker makes a few
_AHEAD: Final = 2  # pieces that wait for each model worker


class RayWorkers:
    """The workers of one run, and the tracker of their starts and reports."""

    def __init__(self, job: Job, resources: Resources, attempts: int) -> None:
        start_ray(resources)
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.job, self.resources, self.attempts = job, resources, attempts
        # On the driver's node, so that its counts are not lost with another node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(TrackerActor)
        self.tracker = actor.remote(job.name)
        self._job = ray.put(job)
        self._shared = self._share()
        self._task = ray.remote(num_cpus=1, max_retries=0)(_run_unit)
        self._running: dict[Any, Unit] = {}
        self._models: list[Any] = []
        self._cpus, self._looked = 1.0, float("-inf")

    def stream(self, units: Sequence[Unit]) -> Iterator[list[Ended]]:
        """Commit the units; yield how they ended, those together that end at the same time."""
        import ray

        left = deque(units)
        while left or self._running:
            self._look()
            while left and len(self._running) < max(_WAITING_TASKS, 2 * self._cpus):
                unit = left.popleft()
                self._running[self._start(unit)] = unit
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=_LOOK_EVERY_S)
            if ready:  # and all others that are
                ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            results = [(self._running.pop(task), _result(task)) for task in ready]
            left.extendleft(unit for unit, result in results if result is None)
            if ended := [result for _, result in results if result is not None]:
                yield ended

    def starts(self, items: Sequence[str]) -> dict[str, int]:
        """Return how often each of the items was started."""
        counts: dict[str, int] = self._get(self.tracker.starts.remote(list(items)))
        return counts

    def ended(self, outcome: str, units: Sequence[str]) -> None:
        """Count units that are `committed`, `quarantined`, or will be `retried`."""
        if units:
            self.tracker.ended.remote(outcome, list(units))

    def reported(self) -> dict[str, float]:
        """Return the counts that workers have reported so far, for the display."""
        from ray.exceptions import RayError

        try:
            return dict(self._get(self.tracker.counts.remote()))
        except RayError as error:  # a slow or lost tracker must not stop the work; the display stays as it was
            log.debug("%s: no counts for the display: %s", self.job.name, first_line(str(error)))
            return {}

    def close(self) -> None:
        """Stop the units that are still running, and the model workers. Ray ends its own processes."""
        import ray

        for task in self._running:
            ray.cancel(task, force=True)
        for actor in (*self._models, *self._shared):
            ray.kill(actor)
        self._running, self._models, self._shared = {}, [], []

    def _start(self, unit: Unit) -> Any:
        ahead = _AHEAD + _AHEAD * len(self._models) // max(1, int(self._cpus)) if self._models else 0
        spec = (unit.id, unit.spec, unit.is_retry)
        # In a list, a reference is passed on as it is: a worker reads the job once, not for each unit.
        return self._task.remote([self._job], self.tracker, self.attempts, str(Path.cwd()), spec, ahead, self._shared)

    def _share(self) -> list[Any]:
        """Start the actors that hold what workers share: one for each `_CPUS_A_SHARE` CPUs."""
        import ray

        if type(self.job).shared is Job.shared:
            return []
        count = 1 + int(ray.cluster_resources().get("CPU", 1)) // _CPUS_A_SHARE
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(SharedActor)
        return [actor.remote([self._job]) for _ in range(count)]

    def _look(self) -> None:
        """Look at the cluster now and then; start model workers if it has grown."""
        import ray

        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._looked, cluster = time.monotonic(), ray.cluster_resources()
        self._cpus = cluster.get("CPU", 1.0)
        if not has_model(self.job):
            return
        # The recipe's number of GPUs (an autoscaler may yet start them), or all that there are now.
        gpus = float(cluster.get("GPU", 0) if self.resources.gpus is None else self.resources.gpus)
        workers = self.resources.model_workers or max(1, int(gpus))
        # An actor runs on one node: by default it requests at most one GPU.
        each = self.job.gpus_per_worker or min(1.0, gpus / workers) or None
        actor = ray.remote(num_cpus=0, num_gpus=each, max_restarts=-1)(ModelActor)
        if len(self._get(self.tracker.models.remote())) < len(self._models):
            # Some have not started, or died, or were out for a moment; or the tracker itself has started again.
            for model in self._models:
                model.join.remote()
        while len(self._models) < workers:
            self._models.append(actor.remote([self._job], self.tracker, self.attempts, str(Path.cwd())))

    @staticmethod
    def _get(reference: Any) -> Any:
        import ray

        return ray.get(reference, timeout=60)


class ModelWorker(NamedTuple):
    """A model worker that is ready. `life` differs after each restart."""

    life: str
    actor: Any
    node: str


class TrackerActor:
    """A small actor that outlives workers. It counts how often each piece of work was started, and what was reported.

    It also knows the model workers that are ready. It alone writes to Ray's exporter, so that each series has one
    writer. docs/metrics.md describes the series; there `stage` is the job's name up to its first hyphen.
    """

    def __init__(self, job: str) -> None:
        from ray.util.metrics import Counter as Metric

        self._starts, self._counts, self._stage = dict[str, Counter[str]](), Counter[str](), job.partition("-")[0]
        self._models: dict[str, ModelWorker] = {}
        about = {
            "samples": ("capstan_samples_total", "Samples looked at, good or failed", ("stage",)),
            "bytes": ("capstan_bytes_total", "Bytes of images read", ("stage",)),
            "failed": ("capstan_failed_total", "Samples that failed, by reason", ("stage", "reason")),
            "units": ("capstan_units_total", "Units that ended, by outcome", ("stage", "outcome")),
        }
        self._metrics = {name: Metric(*arguments) for name, arguments in about.items()}

    def start(self, unit: str, item: str) -> int:
        """Count a start of `item`, the unit or one of its pieces; return how often it was started."""
        starts = self._starts.setdefault(unit, Counter())
        starts[item] += 1
        return starts[item]

    def starts(self, units: list[str]) -> dict[str, int]:
        return {unit: self._starts.get(unit, Counter())[unit] for unit in units}

    def add(self, counts: dict[str, float]) -> None:
        self._counts.update(counts)
        for name, value in counts.items():
            kind, _, reason = name.partition(".")
            if value > 0 and kind in self._metrics:
                self._metrics[kind].inc(value, {"stage": self._stage} | ({"reason": reason} if reason else {}))

    def ended(self, outcome: str, units: list[str]) -> None:
        """Count units that are `committed`, `quarantined`, or will be `retried`; forget those that will not."""
        self._metrics["units"].inc(len(units), {"stage": self._stage, "outcome": outcome})
        for unit in units if outcome != "retried" else ():
            self._starts.pop(unit, None)

    def counts(self) -> dict[str, float]:
        return dict(self._counts)

    def join(self, model: ModelWorker) -> None:
        """Add a model worker that is ready."""
        self._models[model.life] = model

    def leave(self, life: str) -> None:
        """Remove a model worker that has died."""
        self._models.pop(life, None)

    def models(self) -> list[ModelWorker]:
        return list(self._models.values())


class _Remote:
    """The tracker actor as workers see it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def start(self, unit: str, item: str) -> int:
        import ray

        return int(ray.get(self._actor.start.remote(unit, item)))

    def add(self, counts: dict[str, float]) -> None:
        self._actor.add.remote(counts)


class ModelActor:
    """A model worker."""

    def __init__(self, job: list[Any], tracker: Any, attempts: int, folder: str) -> None:
        import ray

        stand_in(folder)
        self._job, self._tracker, self._attempts = job, tracker, attempts
        self._model: Model | None = None
        context = ray.get_runtime_context()
        self._me = ModelWorker(uuid.uuid4().hex, context.current_actor, context.get_node_id())
        self.join()

    def join(self) -> None:
        """Tell the tracker that this worker is ready."""
        self._tracker.join.remote(self._me)

    def apply(self, row: Wire) -> Wire:
        """Return the model's output of a piece."""
        try:
            self._model = self._model or Model(_job(self._job), _Remote(self._tracker), self._attempts)
        except Exception as error:  # noqa: BLE001 - a job that cannot be loaded fails every unit with this reason
            return Wire(row.unit, error=reason_of(error))
        return self._model(row)


class _Models:
    """The model workers as a unit's worker sees them: wire rows of pieces → wire rows of outputs, in any order.

    At most `ahead` pieces wait. A piece goes to the model worker that has the fewest of this unit's, then to one on
    this node. If a model worker dies, its pieces go to another.
    """

    def __init__(self, tracker: Any, ahead: int) -> None:
        import ray

        self._tracker, self._ahead = tracker, ahead
        self._node = ray.get_runtime_context().get_node_id()
        self._workers: list[ModelWorker] = []
        self._looked = float("-inf")
        self._waiting: dict[Any, tuple[Wire, ModelWorker]] = {}

    def __call__(self, rows: Iterable[Wire]) -> Iterator[Wire]:
        for row in rows:
            if row.last or row.error:
                yield row
                continue
            while len(self._waiting) >= self._ahead:
                yield from self._outputs()
            self._send(row)
        while self._waiting:
            yield from self._outputs()

    def _outputs(self) -> Iterator[Wire]:
        """Wait for an output."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        (ready,), _ = ray.wait(list(self._waiting), num_returns=1)
        row, worker = self._waiting.pop(ready)
        try:
            yield ray.get(ready)
        except RayTaskError:
            raise
        except RayError as error:  # it died, or its node
            log.info("a model worker died with %s: %s", item_of(row), first_line(str(error)))
            self._tracker.leave.remote(worker.life)
            self._looked = float("-inf")
            self._send(row)

    def _send(self, row: Wire) -> None:
        loads = Counter(worker.life for _, worker in self._waiting.values())
        workers = self._ready()
        worker = min(workers, key=lambda worker: (loads[worker.life], worker.node != self._node, random.random()))
        self._waiting[worker.actor.apply.remote(row)] = row, worker

    def _ready(self) -> list[ModelWorker]:
        """Return the model workers that are ready; wait for one if none is."""
        import ray

        while not self._workers or time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._workers, self._looked = ray.get(self._tracker.models.remote()), time.monotonic()
            if not self._workers:
                time.sleep(0.2)
        return self._workers


class SharedActor:
    """One of the objects that workers share."""

    def __init__(self, job: list[Any]) -> None:
        self._target = _job(job).shared()

    def call(self, method: str, *arguments: object) -> Any:
        return getattr(self._target, method)(*arguments)


class _OnActors:
    """The shared objects as workers see them."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def key_of(self, name: str) -> int:
        return hash_of(name) % len(self._actors)

    async def call(self, key: int, method: str, *arguments: object) -> Any:
        from ray.exceptions import RayActorError

        try:
            return await self._actors[key].call.remote(method, *arguments)
        except RayActorError as error:
            raise ConnectionError(first_line(str(error))) from error


def _run_unit(
    job: list[Any],
    tracker: Any,
    attempts: int,
    folder: str,
    spec: tuple[Any, ...],
    ahead: int,
    shared: list[Any],
) -> Ended:
    """Commit a unit, in a worker; return how it ended."""
    stand_in(folder)
    set_shared(_OnActors(shared) if shared else None)
    unit = Unit(*spec)
    try:
        prepare = Prepare(_job(job), _Remote(tracker), attempts)
        rows = prepare(unit)
        (ended,) = commits(prepare.job, [unit], _Models(tracker, ahead)(rows) if ahead else rows)
    except Exception as error:  # noqa: BLE001 - a job that cannot be loaded fails every unit with this reason
        return Ended(unit.id, {}, reason_of(error))
    return ended


_loaded: dict[str, Job] = {}  # in a worker: the job of the unit before


def _job(reference: list[Any]) -> Job:
    import ray

    (job,) = reference
    if (loaded := _loaded.get(job.hex())) is None:
        _loaded.clear()
        loaded = _loaded[job.hex()] = ray.get(job)
    return loaded


def _result(task: Any) -> Ended | None:
    """Return how the unit of this task ended; None if its worker or its node died."""
    import ray
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

    try:
        return cast(Ended, ray.get(task))
    except (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError):
        return None
