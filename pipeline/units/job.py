"""Unit, Job, Piece: what a distributed job is made of

A job only describes its work; `capstan.pipeline.units.run` does it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from capstan.pipeline.storage import Storage
from capstan.pipeline.units.markers import MarkerLog

Piece = dict[str, Any]

_REPORT_EVERY_S = 1.0


@dataclass(frozen=True)
class Unit:
    """A unit of work: an id that is a good file name, and what `prepare` needs to know, as plain JSON data.

    `spec["rows"]`, if present, is the number of samples that it will report: the display shows progress by it.
    `is_retry`, set for workers: the unit was started before in this run, and failed or ended its worker.
    """

    id: str
    spec: dict[str, Any] = field(default_factory=dict)
    is_retry: bool = False


class Job(ABC):
    """The work to do for each unit. Instances are pickled to the workers, so they hold only settings and storages.

    `name` names the folder of markers, state/<name>/, in `state` or else in `storage`; `title` is for the display.
    """

    name: str
    title: str = ""
    storage: Storage
    state: Storage | None = None  # of the driver, for markers that nothing needs after the run
    gpus_per_worker: int | None = None  # of a model worker; None: its share of the GPUs, at most 1

    @property
    def markers(self) -> MarkerLog:
        """The job's markers."""
        return MarkerLog(self.state or self.storage, self.name)

    def check_storage(self) -> None:
        """Raise CapstanError if no unit can be done at the moment, since the storage does not answer or is full."""
        self.storage.check_writable()

    @abstractmethod
    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Read, fetch and decode on a CPU worker; yield pieces of at most some MB (encoded bytes, not arrays).

        Finished files may be published here under names that nothing lists until `commit`. May yield nothing.
        """

    def model(self) -> Callable[[Piece], Piece] | None:
        """Return the function that is applied to every piece; override it to add a model stage.

        Called once on each model worker. The function may use `model_threads(resources)` CPU threads. Pieces come one
        by one: a piece is a batch.
        """
        return None

    def shared(self) -> object | None:
        """Return an object for all workers of a run: they call its methods by `capstan.pipeline.units.shared()`.

        On Ray there may be several, each responsible for some keys.
        """
        return None

    @abstractmethod
    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        """Publish the unit's outputs, on a worker. The result is kept in the marker, which the driver writes next.

        Numbers are summed over units into `Summary.counts`; any other JSON value is kept in the marker only.
        """


def report(counts: Mapping[str, float]) -> None:
    """Report counts to the progress display and to Prometheus, from inside `prepare` or a model.

    Names as in pipeline.progress: `samples`, `bytes`, `failed.<reason>`, or any other. Does nothing outside a worker.
    """
    if _reporter is not None:
        _reporter.add(counts)


class Reports(Protocol):
    """Takes what workers report."""

    def add(self, counts: dict[str, float]) -> None:
        """Add these counts."""


def start_reporting(tracker: Reports) -> None:
    """Send what this worker reports to `tracker` from now on."""
    global _reporter
    _reporter = _Reporter(tracker)


def flush_reports() -> None:
    """Send what this worker has reported and not sent yet."""
    if _reporter is not None:
        _reporter.flush()


class _Reporter:
    """Sums counts in a worker and sends them about once per second."""

    def __init__(self, tracker: Reports) -> None:
        self._tracker, self._pending, self._sent = tracker, Counter[str](), time.monotonic()

    def add(self, counts: Mapping[str, float]) -> None:
        self._pending.update(counts)
        if time.monotonic() - self._sent >= _REPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self._tracker.add(dict(self._pending))
        self._pending, self._sent = Counter(), time.monotonic()


_reporter: _Reporter | None = None  # of the unit that this worker is processing
