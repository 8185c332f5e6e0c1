"""What workers do: unit → pieces, piece → piece by a model, and pieces → committed unit

Between processes a piece travels in a wire row, pickled. Only how a unit ended reaches the driver's main loop.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from capstan.pipeline.errors import CapstanError
from capstan.pipeline.records import storable
from capstan.pipeline.units.job import Job, Piece, Reports, Unit, flush_reports, start_reporting


class Wire(NamedTuple):
    """A wire row: a piece, the end of a unit, or the reason why a unit failed.

    `error` is empty for a good piece; with an error, `data` is a pickled CapstanError or empty. The row with `last`
    carries no piece: its place is the number of pieces.
    """

    unit: str
    place: int = 0
    last: bool = False
    error: str = ""
    data: bytes = b""


class Ended(NamedTuple):
    """How an attempt at a unit ended: it is committed and has these facts, or it failed for a reason.

    `error` is empty for a committed unit; with an error, `data` is a pickled CapstanError or empty.
    """

    unit: str
    facts: dict[str, Any]
    error: str = ""
    data: bytes = b""


class Tracker(Reports, Protocol):
    """Counts how often each piece of work was started, and what was reported."""

    def start(self, unit: str, item: str) -> int:
        """Count a start of `item`, the unit or one of its pieces; return how often it was started."""


def stand_in(folder: str) -> None:
    """Work in the driver's folder, so that relative paths mean the same; on another machine it may not exist.

    Workers keep the folder in which they were started, but a notebook may move on.
    """
    with contextlib.suppress(OSError):
        os.chdir(folder)


class Prepare:
    """The first stage: unit → wire rows of its pieces."""

    def __init__(self, job: Job, tracker: Tracker, attempts: int) -> None:
        self.job, self.tracker, self.attempts = job, tracker, attempts

    def __call__(self, unit: Unit) -> Iterator[Wire]:
        starts = self.tracker.start(unit.id, unit.id)
        if starts > self.attempts:
            yield died(unit.id, self.attempts)
            return
        unit = replace(unit, is_retry=unit.is_retry or starts > 1)
        start_reporting(self.tracker)
        place = 0
        try:
            for piece in self.job.prepare(unit):
                yield Wire(unit.id, place, data=pickle.dumps(piece, pickle.HIGHEST_PROTOCOL))
                place += 1
        except Exception as error:  # noqa: BLE001 - the unit boundary: a bad unit is a row with a reason
            yield _failure(unit.id, error)
        else:
            yield Wire(unit.id, place, last=True)
        finally:
            flush_reports()


class Model:
    """The second stage: wire row of a piece → wire row of the model's output.

    The model is loaded when the first piece comes, so that one that kills its worker while loading is bounded like any
    other piece of work.
    """

    def __init__(self, job: Job, tracker: Tracker, attempts: int) -> None:
        self.job, self.tracker, self.attempts = job, tracker, attempts
        self.apply: Callable[[Piece], Piece] | None = None

    def __call__(self, row: Wire) -> Wire:
        if self.tracker.start(row.unit, item_of(row)) > self.attempts:
            return died(row.unit, self.attempts)
        start_reporting(self.tracker)
        try:
            if self.apply is None:
                self.apply = self.job.model()
                assert self.apply is not None, f"{self.job.name} overrides model(), which returned None"
            piece = self.apply(pickle.loads(row.data))
            return Wire(row.unit, row.place, data=pickle.dumps(piece, pickle.HIGHEST_PROTOCOL))
        except Exception as error:  # noqa: BLE001 - the unit boundary: a bad piece is a row with a reason
            return _failure(row.unit, error)
        finally:
            flush_reports()


class Gathered:
    """The pieces of one unit, until all of them have arrived, in any order."""

    def __init__(self) -> None:
        self.pieces: dict[int, Piece] = {}
        self.expected: int | None = None

    def add(self, row: Wire) -> list[Piece] | None:
        """Add a wire row; return all pieces in order once they are complete. The last row is an empty end mark."""
        if row.last:
            self.expected = row.place
        else:
            self.pieces[row.place] = pickle.loads(row.data)
        if self.expected is None or len(self.pieces) < self.expected:
            return None
        return [self.pieces[index] for index in range(self.expected)]


def commits(job: Job, units: Sequence[Unit], rows: Iterable[Wire]) -> Iterator[Ended]:
    """Commit each of `units` once all of its rows have arrived; yield how each unit ended.

    A unit whose rows do not all arrive is left out.
    """
    by_id, gathered = {unit.id: unit for unit in units}, {unit.id: Gathered() for unit in units}
    for row in rows:
        if row.unit not in gathered:
            continue  # a late piece of a unit that has ended
        if row.error:
            del gathered[row.unit]
            yield Ended(row.unit, {}, row.error, row.data)
        elif (pieces := gathered[row.unit].add(row)) is not None:
            del gathered[row.unit]
            yield _commit(job, by_id[row.unit], pieces)


def _commit(job: Job, unit: Unit, pieces: list[Piece]) -> Ended:
    try:
        return Ended(unit.id, job.commit(unit, pieces))
    except Exception as error:  # noqa: BLE001 - a unit that cannot be published fails alone
        return Ended(unit.id, {}, *_described(error))


def has_model(job: Job) -> bool:
    """Return whether the job has a model stage."""
    return type(job).model is not Job.model


def item_of(row: Wire) -> str:
    """Return the name by which starts of the model on this piece are counted."""
    return f"{row.unit}#{row.place}"


def died(unit: str, attempts: int) -> Wire:
    """Return the wire row of a unit that has killed its worker too often."""
    times = f"{attempts} times without an exception (out of memory, or a crash in a library)"
    return Wire(unit, error=f"died: its worker ended {times}")


def _failure(unit: str, error: Exception) -> Wire:
    reason, data = _described(error)
    return Wire(unit, error=reason, data=data)


def _described(error: Exception) -> tuple[str, bytes]:
    return reason_of(error), pickle.dumps(error) if isinstance(error, CapstanError) else b""


def reason_of(error: Exception) -> str:
    """Return type and message on the first line and the traceback below, as text that Arrow can carry to the driver."""
    first = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return storable(f"{first}\n{''.join(traceback.format_exception(error))}")
