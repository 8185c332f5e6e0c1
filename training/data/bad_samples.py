"""Samples that cannot be read or decoded: named, or skipped and counted

    RUN/bad-samples.jsonl    one line per skipped sample: key, shard, row, reason, and the first step it came in

All workers of a run share the file, so that `train.data.bad.skip` bounds the whole run, across workers and resumes.
"""

from __future__ import annotations

import fcntl
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from capstan.pipeline.errors import CapstanError, first_line

logger = logging.getLogger(__name__)

FILE: Final = "bad-samples.jsonl"


@dataclass(frozen=True)
class Location:
    """Where a sample is stored."""

    dataset: str  # URL
    shard: str
    row: int
    key: str

    def __str__(self) -> str:
        return f"sample {self.key} ({self.dataset}/shards/{self.shard}.tar, row {self.row})"


class BadSamples:
    """The samples that a run skips, at most `limit`; `file` keeps them (without one, none may be skipped)."""

    def __init__(self, file: Path | None = None, limit: int = 0) -> None:
        self.file, self.limit = file, limit

    def add(self, where: Location, step: int, error: Exception) -> None:
        """Record a sample that came in `step`. Raises CapstanError, naming it, if it is one too many."""
        reason = f"{type(error).__name__}: {first_line(error)}"
        if self.file is None or self.limit == 0:
            raise CapstanError(f"training: {where} cannot be used ({reason}). Fix: {_hint(where, 100)}") from error
        with self.file.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            known = _read(file)
            if any((one["dataset"], one["key"]) == (where.dataset, where.key) for one in known):
                return
            if len(known) >= self.limit:
                problem = f"training: {where} cannot be used ({reason}), and train.data.bad.skip is {self.limit}"
                listing = f"{self.limit} others are listed in {self.file}"
                raise CapstanError(f"{problem}; {listing}. Fix: {_hint(where, 2 * self.limit)}") from error
            record = {**asdict(where), "reason": reason, "step": step}
            file.write(json.dumps(record) + "\n")
            file.flush()
        logger.warning("skipping %s: %s (%d of at most %d)", where, reason, len(known) + 1, self.limit)

    def count(self, step: int) -> int:
        """Return how many samples were skipped in the first `step` steps."""
        if self.file is None or not self.file.exists():
            return 0
        with self.file.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return sum(one["step"] < step for one in _read(file))


def _hint(where: Location, limit: int) -> str:
    return (
        f"run `capstan verify {where.dataset}`; remove the sample with `capstan remove {where.dataset} --keys FILE`; "
        f"or set train.data.bad: {{skip: {limit}}}"
    )


def _read(file: Any) -> list[dict[str, Any]]:
    """Return the complete lines of the file; a killed worker may have left half of one, which is cut off."""
    file.seek(0)
    text = file.read()
    whole = text[: text.rfind("\n") + 1]
    if whole != text and file.writable():
        file.truncate(len(whole.encode()))
    return [json.loads(line) for line in whole.splitlines()]
