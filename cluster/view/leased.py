"""Small tables of a dataset that the browser changes: read and replaced as a whole, under a lease

A change is on storage before the browser sees it as saved. The lease of a table is held while changes come, and
released after a pause, since a build needs the whole dataset.
"""

from __future__ import annotations

import contextlib
import getpass
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from capstan.pipeline.lease import HeldLease, lease
from capstan.pipeline.storage import Storage

IDLE_S: Final = 20.0


@dataclass(frozen=True)
class Kept:
    """A table: the part of the dataset whose lease a change needs, and how it is read and published."""

    part: str
    read: Callable[[], pa.Table]
    write: Callable[[pa.Table], None]


class LeasedTables:
    """The changeable tables of one dataset; the lease of one at a time is held. Safe to call from several threads."""

    def __init__(self, storage: Storage, idle_s: float = IDLE_S) -> None:
        self.storage, self._idle_s = storage, idle_s
        self.who = _user()
        self._lock = threading.Lock()
        self._part, self._table = "", pa.table({})  # the table whose lease is held
        self._held: HeldLease | None = None
        self._leases = contextlib.ExitStack()
        self._timer: threading.Timer | None = None

    def read(self, kept: Kept) -> pa.Table:
        """Return a table as it is now."""
        with self._lock:
            return self._table if self._held is not None and kept.part == self._part else kept.read()

    def change(self, kept: Kept, alter: Callable[[pa.Table], pa.Table]) -> tuple[pa.Table, pa.Table]:
        """Publish a table as `alter` returns it; return it before and after.

        Raises CapstanError if another process writes this table or the whole dataset.
        """
        with self._lock:
            with contextlib.ExitStack() as failed:
                failed.callback(self._release)
                self._hold(kept).check()
                before, after = self._table, alter(self._table)
                kept.write(after)
                failed.pop_all()  # the lease is held for the next change
            self._table = after
            return before, after

    def _hold(self, kept: Kept) -> HeldLease:
        """Take the lease of a table unless it is held, and read the table as it is now."""
        if self._timer is not None:
            self._timer.cancel()
        if self._held is None or kept.part != self._part:
            self._release()
            self._held = self._leases.enter_context(lease(self.storage, "view", part=kept.part))
            self._part, self._table = kept.part, kept.read()
        self._timer = threading.Timer(self._idle_s, self.close)
        self._timer.daemon = True
        self._timer.start()
        return self._held

    def _release(self) -> None:
        self._held = None
        self._leases.close()

    def close(self) -> None:
        """Give the lease back."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._release()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
