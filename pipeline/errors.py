"""Errors that Capstan raises on purpose, and their exit codes

    CapstanError             1    something failed; the message says what
    ├── RecipeError          2    bad recipe, arguments or input: names the field and the fix
    │   └── MissingExtra     2    an optional package is not installed: names the extra to install
    ├── StorageError         1    an operation on a file or bucket failed: names the object and the fix
    │   └── DiskFull         1    no space left: names the folder and how much is needed
    ├── DamagedFile          1    a file of a dataset is not what was written: names the file
    └── Quarantined          3    finished, but some units kept failing

An interrupt (Ctrl-C, Ctrl-\\, SIGTERM, a closed terminal) ends with 130; the command line sees to that.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Final

# The signals that interrupt a command. A terminal sends all but SIGTERM to each process of its foreground.
INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
FROM_TERMINAL: Final = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class CapstanError(Exception):
    """A failure that Capstan expects. Printed without a traceback."""

    exit_code = 1


class RecipeError(CapstanError):
    """An error that the user can fix: the field that is wrong, the problem, and what to do.

    >>> str(RecipeError("fetch.retries", "must be a whole number", "set e.g. retries: 2"))
    'fetch.retries: must be a whole number. Fix: set e.g. retries: 2'
    """

    exit_code = 2

    def __init__(self, field: str, problem: str, hint: str) -> None:
        super().__init__(field, problem, hint)
        self.field, self.problem, self.hint = field, problem, hint

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}. Fix: {self.hint}"


class MissingExtra(RecipeError):
    """An optional part was requested and its package is not installed."""

    def __init__(self, field: str, package: str, extra: str) -> None:
        super().__init__(field, f"needs the package {package}", f"pip install 'capstan-t2i[{extra}]'")

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, str, str]]:
        return RecipeError, (self.field, self.problem, self.hint)


class StorageError(CapstanError):
    """A storage operation that failed after all retries: the operation, the problem, and what to do.

    >>> str(StorageError("read s3://bucket/a", "503 Slow Down, 5 tries", "try later"))
    'cannot read s3://bucket/a (503 Slow Down, 5 tries). Fix: try later'
    """

    def __init__(self, action: str, problem: str, hint: str) -> None:
        super().__init__(action, problem, hint)
        self.action, self.problem, self.hint = action, problem, hint

    def __str__(self) -> str:
        return f"cannot {self.action} ({self.problem}). Fix: {self.hint}"


class DiskFull(StorageError):
    """No space left on a disk."""


class DamagedFile(CapstanError):
    """A file of a dataset whose content is not what Capstan wrote: its path or URL, what differs, and what to do."""

    def __init__(
        self, file: str, problem: str, hint: str = "run `capstan verify DATASET --repair`, or build again"
    ) -> None:
        super().__init__(file, problem, hint)
        self.file, self.problem, self.hint = file, problem, hint

    def __str__(self) -> str:
        return f"{self.file} is damaged ({self.problem}). Fix: {self.hint}"


class Quarantined(CapstanError):
    """A job that finished although some units kept failing: unit id → reason."""

    exit_code = 3

    def __init__(self, job: str, units: Mapping[str, str]) -> None:
        super().__init__(job, dict(units))
        self.job, self.units = job, dict(units)

    def __str__(self) -> str:
        lines = [f"  {unit}: {reason}" for unit, reason in sorted(self.units.items())]
        return "\n".join([f"{self.job}: {len(lines)} unit(s) quarantined; run again to retry them", *lines])


def first_line(reason: str | BaseException) -> str:
    """Return the first line of a message that is not blank; of an exception without a message, its type's name.

    >>> first_line("a\\nb"), first_line(ValueError()), first_line(KeyError("x"))
    ('a', 'ValueError', "'x'")
    """
    name = "" if isinstance(reason, str) else type(reason).__name__
    return next((line.strip() for line in str(reason).splitlines() if line.strip()), name)
