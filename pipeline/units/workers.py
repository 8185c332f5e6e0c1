"""What a job is, and what Ray's workers do with it: a unit → its pieces, each one row on the wire; pieces → pieces.

A piece crosses Ray as one pickled column; so there are no null-typed or ragged columns for Arrow to stumble over.
"""

from __future__ import annotations

import json
import pickle
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from capstan.pipeline.errors import CapstanError
from capstan.pipeline.records import storable
from capstan.pipeline.storage import Storage

Piece = dict[str, Any]

# `error` is empty for a good piece; `data` of a piece with an error is a pickled CapstanError or empty. The row with
# `last` carries no piece: its index is their number.
WIRE = pa.schema(
    [
        pa.field("unit", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("last", pa.bool_(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)
_REPORT_EVERY_S = 1.0


@dataclass(frozen=True)
class Unit:
    """A unit of work: an id that is a good file name, and what `prepare` needs to know, as plain JSON data.

    `spec["rows"]`, if there, is how many samples it will report: with it the display knows how far a unit has come.
    """

    id: str
    spec: dict[str, Any] = field(default_factory=dict)


class Job(ABC):
    """What is done to each unit. Instances are pickled to the workers, so they hold only settings and storages.

    `name` names the folder of markers, state/<name>/; `storage` is where that lies; `title` is for the display.
    """

    name: str
    title: str = ""
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


def report(counts: Mapping[str, float]) -> None:
    """From inside `prepare` or a model: counts for the progress display and for Prometheus. Elsewhere it does nothing.

    Names as in pipeline.progress: `samples`, `bytes`, `failed.<reason>`, or any other.
    """
    if _reporter is not None:
        _reporter.add(counts)


class Tracker:
    """A small actor that outlives workers: how often each piece of work was started, and what was reported.

    It alone speaks to Ray's exporter, so that each series has one writer. docs/metrics.md describes the series; there
    `stage` is what stands before the first hyphen of the job's name.
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

    def begin(self, item: str) -> int:
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
        """A unit is `committed`, `quarantined`, or will be `retried`."""
        self._metrics["units"].inc(1, {"stage": self._stage, "outcome": outcome})

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


class Prepare:
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


class Model:
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
    return pa.table([[unit], [index], [last], [error], [data]], schema=WIRE)


def _failure(unit: str, error: Exception) -> pa.Table:
    ours = pickle.dumps(error) if isinstance(error, CapstanError) else b""
    return _row(unit, error=reason_of(error), data=ours)


def reason_of(error: Exception) -> str:
    """Type and message on the first line, the traceback below: text that Arrow can carry to the driver."""
    first = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return storable(f"{first}\n{''.join(traceback.format_exception(error))}")
