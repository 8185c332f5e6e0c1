"""A worker process of a small run: what it is sent, and what it answers

    driver → worker    Start (a job), then Unit or Wire (work), one at a time
    worker → driver    Wire rows, Counter (reported counts), Done after each piece of work

The driver's end of the connection closes when the driver ends, however it ends; the worker then ends at once.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from capstan.pipeline.errors import FROM_TERMINAL
from capstan.pipeline.units import child
from capstan.pipeline.units.job import Unit
from capstan.pipeline.units.shared import OnSocket, set_shared
from capstan.pipeline.units.workers import Model, Prepare, Wire, reason_of, stand_in

ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # as in Ray's workers
# A model's threads sleep while they wait: spinning, they would keep cores from those that prepare images for it.
_SLEEPING: Final = {"OMP_WAIT_POLICY": "PASSIVE"}
_IDLE_S: Final = 300  # without work, a worker that is kept for the driver's next run ends


class Start(NamedTuple):
    """A job to work on from now on: pickled, with the driver's folder, import path and environment."""

    job: bytes
    model: bool  # whether this worker runs the model stage
    folder: str
    path: list[str]
    environment: dict[str, str]
    shared: tuple[str, bytes] | None  # where the driver serves what workers share, and the key to it


class Done(NamedTuple):
    """The end of a piece of work."""


def main() -> None:
    """Work for the driver at the other end of the pipe."""
    for number in FROM_TERMINAL:  # a terminal sends them to all; the driver decides
        signal.signal(number, signal.SIG_IGN)
    connection, inbox = child.connection(), queue.Queue[Any](1)
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    work: Callable[[Any], Iterator[Wire]] | None = None
    while True:
        try:
            message = inbox.get(timeout=_IDLE_S)
        except queue.Empty:
            return
        if isinstance(message, Start):
            work = _begin(message, _Tracker(connection))
            continue
        assert work is not None
        for row in work(message):
            _send(connection, row)
        _send(connection, Done())


def _begin(start: Start, tracker: _Tracker) -> Callable[[Any], Iterator[Wire]]:
    sys.path[:] = start.path
    os.environ.clear()
    os.environ.update(_SLEEPING | start.environment | ONE_THREAD)
    stand_in(start.folder)
    set_shared(OnSocket(*start.shared) if start.shared else None)
    try:
        job = pickle.loads(start.job)
    except Exception as error:  # noqa: BLE001 - a job that cannot be loaded fails every unit with this reason
        reason = reason_of(error)
        return lambda item: iter([Wire(item.unit if isinstance(item, Wire) else item.id, error=reason)])
    if not start.model:
        prepare = Prepare(job, tracker, attempts=1)
        return prepare.__call__
    model = Model(job, tracker, attempts=1)
    return lambda row: iter([model(row)])


class _Tracker:
    """Sends reports to the driver, which counts starts itself."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def start(self, unit: str, item: str) -> int:
        return 1

    def add(self, counts: dict[str, float]) -> None:
        _send(self._connection, Counter(counts))


def _receive(connection: Connection, inbox: queue.Queue[Any]) -> None:
    """Put what the driver sends into `inbox`; end the process when the driver is gone."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(_unpack(connection.recv_bytes()))
    os._exit(0)


def _unpack(data: bytes) -> Any:
    kind, fields = pickle.loads(data)
    return {"start": Start, "unit": Unit, "piece": Wire}[kind](*fields)


def _send(connection: Connection, message: Any) -> None:
    try:
        connection.send(message)
    except OSError:  # the driver is gone
        os._exit(0)
