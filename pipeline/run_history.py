"""Run history: state/runs.jsonl, the duration of each run and its stages

One JSON object for each run that did something, the latest last. Nothing else is derived from it: no byte of shards or
ledger depends on it. Interrupted runs are not listed.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from capstan.pipeline.errors import CapstanError
from capstan.pipeline.storage import Storage

RUNS: Final = "state/runs.jsonl"
_KEPT: Final = 200  # runs


class Run(BaseModel):
    """A run: when it ended, the rows that it ingested (fetched, decoded, measured), and seconds per stage."""

    model_config = ConfigDict(frozen=True)

    command: str
    ended: datetime
    rows: int
    seconds: dict[str, float]


def note_run(storage: Storage, command: str, rows: int, seconds: dict[str, float]) -> None:
    """Append a run that ends now."""
    run = Run(command=command, ended=datetime.now(UTC).replace(microsecond=0), rows=rows, seconds=seconds)
    lines = [run.model_dump_json() for run in [*read_runs(storage), run][-_KEPT:]]
    storage.write(RUNS, "".join(f"{line}\n" for line in lines).encode())


def read_runs(storage: Storage) -> list[Run]:
    """Return the runs so far, the latest last. Raises CapstanError for a damaged line."""
    try:
        lines = storage.read(RUNS).splitlines()
    except FileNotFoundError:
        return []
    try:
        return [Run.model_validate_json(line) for line in lines]
    except ValidationError as error:
        raise CapstanError(
            f"{storage.url}/{RUNS} has a line that is not a run ({error.errors()[0]['msg']}). Fix: remove the line"
        ) from None


class Clock:
    """Seconds per stage, for the summary and state/runs.jsonl only: nothing else that is written depends on time."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        """Note that a stage has ended just now."""
        now = time.monotonic()
        self.laps[stage] = round(now - self._last, 3)
        self._last = now
