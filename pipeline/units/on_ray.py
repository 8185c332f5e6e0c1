"""The unit map's workers on Ray: one machine or a cluster

    from_items(units) ─▶ Prepare on CPU workers ─▶ Model on model workers ─▶ the driver
                         a map; yields rows        an actor pool; optional

This is the only module that imports Ray Data. Ray by itself would retry a dying worker for ever; the tracker counts
starts to bound that.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from capstan.pipeline.config import Resources
from capstan.pipeline.errors import RecipeError, first_line
from capstan.pipeline.units.job import Job, Unit
from capstan.pipeline.units.workers import Model, Prepare, Wire, has_model, stand_in

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20  # smaller pieces travel together; a larger one is passed on at once
_GIB = 1 << 30
_CORE_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] \S+\.cc:\d+:")  # as Ray's C++ core writes them
_TYPES = {"unit": pa.string(), "place": pa.int32(), "last": pa.bool_(), "error": pa.string(), "data": pa.large_binary()}
_WIRE = pa.schema([pa.field(name, _TYPES[name], nullable=False) for name in Wire._fields])


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

    def stream(self, units: Sequence[Unit]) -> Iterator[Wire]:
        """Yield the wire rows of all pieces, in the order in which they arrive."""
        import ray.data

        rows = [{"unit": json.dumps({"id": unit.id, "spec": unit.spec})} for unit in units]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset.context.target_max_block_size = _BLOCK_BYTES
        dataset = dataset.map_batches(
            PrepareOnRay(self.job, self.tracker, self.attempts, str(Path.cwd())),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
        )
        if has_model(self.job):
            gpus = _gpus(self.resources)
            workers = self.resources.model_workers or max(1, int(gpus))
            dataset = dataset.map_batches(
                ModelOnRay,
                fn_constructor_args=(self.job, self.tracker, self.attempts, str(Path.cwd())),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
                num_cpus=0,  # unlike prepare's, so that Ray Data does not fuse the two stages
                # An actor runs on one node: by default it requests at most one GPU.
                num_gpus=self.job.gpus_per_worker or min(1.0, gpus / workers) or None,
            )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from _rows_of(batch)

    def starts(self, items: Sequence[str]) -> dict[str, int]:
        """Return how often each of the items was started."""
        counts: dict[str, int] = self._get(self.tracker.starts.remote(list(items)))
        return counts

    def ended(self, outcome: str) -> None:
        """Count a unit that is `committed`, `quarantined`, or will be `retried`."""
        self.tracker.ended.remote(outcome)

    def reported(self) -> dict[str, float]:
        """Return the counts that workers have reported so far, for the display."""
        from ray.exceptions import RayError

        try:
            return dict(self._get(self.tracker.counts.remote()))
        except RayError as error:  # a slow or lost tracker must not stop the work; the display stays as it was
            log.debug("%s: no counts for the display: %s", self.job.name, first_line(str(error)))
            return {}

    def close(self) -> None:
        """Do nothing: Ray ends its workers."""

    @staticmethod
    def _get(reference: Any) -> Any:
        import ray

        return ray.get(reference, timeout=60)


class TrackerActor:
    """A small actor that outlives workers. It counts how often each piece of work was started, and what was reported.

    It alone writes to Ray's exporter, so that each series has one writer. docs/metrics.md describes the series; there
    `stage` is the job's name up to its first hyphen.
    """

    def __init__(self, job: str) -> None:
        from ray.util.metrics import Counter as Metric

        self._starts, self._counts, self._stage = Counter[str](), Counter[str](), job.partition("-")[0]
        about = {
            "samples": ("capstan_samples_total", "Samples looked at, good or failed", ("stage",)),
            "bytes": ("capstan_bytes_total", "Bytes of images read", ("stage",)),
            "failed": ("capstan_failed_total", "Samples that failed, by reason", ("stage", "reason")),
            "units": ("capstan_units_total", "Units that ended, by outcome", ("stage", "outcome")),
        }
        self._metrics = {name: Metric(*arguments) for name, arguments in about.items()}

    def start(self, item: str) -> int:
        """Count a start of `item`; return how often it was started."""
        self._starts[item] += 1
        return self._starts[item]

    def starts(self, items: list[str]) -> dict[str, int]:
        return {item: self._starts[item] for item in items}

    def add(self, counts: dict[str, float]) -> None:
        self._counts.update(counts)
        for name, value in counts.items():
            kind, _, reason = name.partition(".")
            if value > 0 and kind in self._metrics:
                self._metrics[kind].inc(value, {"stage": self._stage} | ({"reason": reason} if reason else {}))

    def ended(self, outcome: str) -> None:
        """Count a unit that is `committed`, `quarantined`, or will be `retried`."""
        self._metrics["units"].inc(1, {"stage": self._stage, "outcome": outcome})

    def counts(self) -> dict[str, float]:
        return dict(self._counts)


class _Remote:
    """The tracker actor as workers see it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def start(self, item: str) -> int:
        import ray

        return int(ray.get(self._actor.start.remote(item)))

    def add(self, counts: dict[str, float]) -> None:
        self._actor.add.remote(counts)


class PrepareOnRay:
    """Prepare as Ray Data calls it: a table of units → tables of wire rows."""

    def __init__(self, job: Job, tracker: Any, attempts: int, folder: str) -> None:
        self._prepare, self._folder = Prepare(job, _Remote(tracker), attempts), folder

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        stand_in(self._folder)
        for text in table["unit"].to_pylist():
            yield from map(_table_of, self._prepare(Unit(**json.loads(text))))


class ModelOnRay:
    """Model as Ray Data calls it, an actor: tables of wire rows → tables of wire rows."""

    def __init__(self, job: Job, tracker: Any, attempts: int, folder: str) -> None:
        stand_in(folder)
        self._model = Model(job, _Remote(tracker), attempts)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in _rows_of(table):
            yield table if row.error or row.last else _table_of(self._model(row))


def _table_of(row: Wire) -> pa.Table:
    return pa.table([[value] for value in row], schema=_WIRE)


def _rows_of(table: pa.Table) -> Iterator[Wire]:
    return (Wire(**row) for row in table.to_pylist())


# Starting Ray --------------------------------------------------------------------------------------------------------


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
            atexit.register(_remove_session, ray)
        with _interrupts_held(), _without_core_lines():
            ray.init(**options)
    _configure()


def _remove_session(ray: Any) -> None:
    """End the Ray that this process started, however far it had come, and remove its folder of logs and sockets."""
    from ray._common.utils import get_default_ray_temp_dir

    ray.shutdown()
    folder = Path(get_default_ray_temp_dir())
    for session in folder.glob(f"session_*_{os.getpid()}"):
        latest = folder / "session_latest"
        with contextlib.suppress(OSError):
            if latest.resolve() == session.resolve():
                latest.unlink()
        shutil.rmtree(session, ignore_errors=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGINT or SIGTERM once Ray has started; at once for a second one.

    Ray swallows exceptions at some points of its start, and would replace the handler of SIGTERM by one that ends the
    process before it could save.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from ray._private import utils

    held = list[int]()

    def hold(number: int, _: object) -> None:
        held.append(number)
        if len(held) > 1:
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, hold) for number in numbers if signal.getsignal(number) is not None}
    set_by_ray, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_by_ray
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


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


def _cpus(resources: Resources) -> int:
    return resources.cpus or len(os.sched_getaffinity(0))


def _gpus(resources: Resources) -> float:
    """Return the GPUs for the model workers: the recipe's number (an autoscaler may yet start them), or all."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0) if resources.gpus is None else resources.gpus)


def _memory_bytes() -> int:
    """Return the memory of this machine, or of this container if that is less."""
    from ray._common.utils import get_system_memory

    return int(get_system_memory())
