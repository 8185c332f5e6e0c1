"""What Ray's workers do: unit → pieces, and piece → piece by a model

A piece crosses Ray as one pickled column, so Arrow never meets null-typed or ragged columns.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from capstan.pipeline.errors import CapstanError
from capstan.pipeline.records import storable
from capstan.pipeline.units.job import Job, Piece, Unit, flush_reports, start_reporting

# `error` is empty for a good piece; with an error, `data` is a pickled CapstanError or empty. The row with `last`
# carries no piece: its index is the number of pieces.
WIRE = pa.schema(
    [
        pa.field("unit", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("last", pa.bool_(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)


class Tracker:
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


def _start(tracker: Any, item: str, attempts: int) -> str:
    """Count a start of `item`; return the reason not to start it if it has killed its worker too often."""
    import ray

    if ray.get(tracker.start.remote(item)) > attempts:
        return f"died: its worker ended {attempts} times without an exception (out of memory, or a crash in a library)"
    start_reporting(tracker)
    return ""


def _stand_in(folder: str) -> None:
    """Work in the driver's folder, so that relative paths mean the same; on another machine it may not exist.

    Ray's workers keep the folder in which Ray was started, but a notebook may move on.
    """
    with contextlib.suppress(OSError):
        os.chdir(folder)


class Prepare:
    """The first stage: a table of units → wire rows of their pieces."""

    def __init__(self, job: Job, tracker: Any, attempts: int, folder: str) -> None:
        self.job, self.tracker, self.attempts, self.folder = job, tracker, attempts, folder

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        _stand_in(self.folder)
        for text in table["unit"].to_pylist():
            yield from self._unit(Unit(**json.loads(text)))

    def _unit(self, unit: Unit) -> Iterator[pa.Table]:
        if reason := _start(self.tracker, unit.id, self.attempts):
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
            flush_reports()


class Model:
    """The second stage, an actor: wire rows → wire rows.

    The model is loaded when the first piece comes, so that one that kills its worker while loading is bounded like any
    other piece of work.
    """

    def __init__(self, job: Job, tracker: Any, attempts: int, folder: str) -> None:
        self.job, self.tracker, self.attempts = job, tracker, attempts
        _stand_in(folder)
        self.apply: Callable[[Piece], Piece] | None = None

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in table.to_pylist():
            yield self._piece(row) if not (row["error"] or row["last"]) else table

    def _piece(self, row: dict[str, Any]) -> pa.Table:
        unit, index = row["unit"], row["index"]
        if reason := _start(self.tracker, f"{unit}#{index}", self.attempts):
            return _row(unit, error=reason)
        try:
            if self.apply is None:
                self.apply = self.job.model()
                assert self.apply is not None, f"{self.job.name} overrides model(), which returned None"
            piece = self.apply(pickle.loads(row["data"]))
            return _row(unit, index, data=pickle.dumps(piece, pickle.HIGHEST_PROTOCOL))
        except Exception as error:  # noqa: BLE001 - the unit boundary: a bad piece is a row with a reason
            return _failure(unit, error)
        finally:
            flush_reports()


def _row(unit: str, index: int = 0, *, last: bool = False, error: str = "", data: bytes = b"") -> pa.Table:
    return pa.table([[unit], [index], [last], [error], [data]], schema=WIRE)


def _failure(unit: str, error: Exception) -> pa.Table:
    ours = pickle.dumps(error) if isinstance(error, CapstanError) else b""
    return _row(unit, error=reason_of(error), data=ours)


def reason_of(error: Exception) -> str:
    """Return type and message on the first line and the traceback below, as text that Arrow can carry to the driver."""
    first = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return storable(f"{first}\n{''.join(traceback.format_exception(error))}")
