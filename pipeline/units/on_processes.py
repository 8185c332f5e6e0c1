"""The unit map's workers without Ray: processes of this machine, for small runs

Starting Ray costs about 15 CPU seconds, a worker process less than one. The promises are the same: a worker that dies
or raises costs its unit an attempt, and nothing outlives the driver. A worker writes into a pipe that the driver reads
only while few pieces wait for the model, so memory does not grow with a unit.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import cloudpickle  # by value what workers cannot import: jobs of a notebook or of a script

from capstan.pipeline.config import Resources
from capstan.pipeline.units.child import start_child
from capstan.pipeline.units.job import Job, Unit
from capstan.pipeline.units.process_worker import ONE_THREAD, Done, Start
from capstan.pipeline.units.shared import Served
from capstan.pipeline.units.workers import Ended, Wire, commits, died, has_model, item_of

_WAITING_PIECES: Final = 2  # per model worker, as on Ray


class ProcessWorkers:
    """The workers of one run, and the counts of their starts and reports."""

    def __init__(self, job: Job, resources: Resources, attempts: int) -> None:
        self.job, self.attempts = job, attempts
        self._cpus = resources.cpus or len(os.sched_getaffinity(0))
        self._models = resources.model_workers or 1 if has_model(job) else 0
        self._starts, self._counts, self._lock = Counter[str](), Counter[str](), threading.Lock()
        self._pickled = cloudpickle.dumps(job)
        self._served = Served(target) if (target := job.shared()) is not None else None
        self._workers: list[_Worker] = []

    def stream(self, units: Sequence[Unit]) -> Iterator[list[Ended]]:
        """Yield how units ended, as they do. They are committed here: few units are left, and small."""
        for ended in commits(self.job, units, self._rows(units)):
            yield [ended]

    def _rows(self, units: Sequence[Unit]) -> Iterator[Wire]:
        """Yield the wire rows of all pieces, in the order in which they arrive."""
        left, pieces = deque(units), deque[Wire]()
        while True:
            yield from self._assign(left, model=False, most=min(self._cpus, len(units)))
            yield from self._assign(pieces, model=True, most=self._models)
            busy = [worker for worker in self._workers if worker.item is not None]
            if not busy:
                return
            full = len(pieces) >= _WAITING_PIECES * max(1, self._models)
            readable = [worker for worker in busy if worker.model or not full]
            ready = set(wait([worker.connection for worker in readable]))
            for worker in readable:
                if worker.connection in ready:
                    yield from self._read(worker, left, pieces)

    def starts(self, items: Sequence[str]) -> dict[str, int]:
        """Return how often each of the items was started."""
        return {item: self._starts[item] for item in items}

    def ended(self, outcome: str, units: Sequence[str]) -> None:
        """Do nothing: only Ray has an exporter of counts, and a run without Ray is small."""

    def reported(self) -> dict[str, float]:
        """Return the counts that workers have reported so far, for the display."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """End the workers that are busy or hold a model; keep the others for the next run."""
        for worker in self._workers:
            if worker.item is not None or worker.model:
                worker.kill()
            else:
                _idle.append(worker)
        self._workers = []
        if self._served:
            self._served.close()

    def _assign(self, queue: deque[Any], *, model: bool, most: int) -> Iterator[Wire]:
        """Send work to free workers; yield the rows of what has been started too often."""
        while queue:
            mine = [worker for worker in self._workers if worker.model == model]
            free = [worker for worker in mine if worker.item is None]
            if not free and len(mine) >= most:
                return
            item = queue.popleft()
            name = item_of(item) if isinstance(item, Wire) else item.id
            self._starts[name] += 1
            if self._starts[name] > self.attempts:
                yield died(item.unit if isinstance(item, Wire) else item.id, self.attempts)
                continue
            worker = free[0] if free else self._add(model)
            worker.item = item
            # A worker that has just died is found when it is read.
            is_retry = self._starts[name] > 1
            worker.send(("piece", tuple(item)) if isinstance(item, Wire) else ("unit", (item.id, item.spec, is_retry)))

    def _add(self, model: bool) -> _Worker:
        worker = _take_idle() or _launch()
        worker.model = model
        served = (self._served.address, self._served.key) if self._served else None
        worker.send(("start", tuple(Start(self._pickled, model, str(Path.cwd()), sys.path, dict(os.environ), served))))
        self._workers.append(worker)
        return worker

    def _read(self, worker: _Worker, left: deque[Unit], pieces: deque[Wire]) -> Iterator[Wire]:
        """Handle one message of a worker."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            item, worker.item = worker.item, None
            worker.kill()
            self._workers.remove(worker)
            (pieces if worker.model else left).appendleft(item)
            return
        if isinstance(message, Done):
            worker.item = None
        elif isinstance(message, Wire):
            if self._models and not (worker.model or message.last or message.error):
                pieces.append(message)
            else:
                yield message
        else:
            with self._lock:
                self._counts.update(message)


@dataclass(eq=False)
class _Worker:
    """A worker process, the driver's end of its connection, and what it works on."""

    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    model: bool = False
    item: Any = None  # a Unit, or a Wire row with a piece

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):
            self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


_idle: list[_Worker] = []  # started for a run that has ended


def _take_idle() -> _Worker | None:
    while _idle:
        worker = _idle.pop()
        if worker.process.poll() is None:
            return worker
        worker.kill()
    return None


def _launch() -> _Worker:
    return _Worker(*start_child("capstan.pipeline.units.process_worker", ONE_THREAD))


@atexit.register
def _end_idle() -> None:
    while _idle:
        _idle.pop().kill()
