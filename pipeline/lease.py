"""Lease: one writer of a dataset at a time

    state/lease.json    {id, command, host, pid, owner, seen}; rewritten every BEAT_S, removed at the end

Two writers at once would remove each other's staged files, since no marker of theirs names them. So the second writer
is refused. Storages do not promise a conditional put, so this is a protocol of good faith and not a lock: each writer
reads the lease back at once, with every beat, and before each stage that removes files. A writer whose lease was
overwritten stops.

A lease is stale, and is taken over, in two cases: its process was on this machine and has ended; or it was not seen for
STALE_S and does not change during two beats. The second check makes differing clocks harmless.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Final

from capstan.pipeline.errors import CapstanError, StorageError
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import is_alive, owner

log = logging.getLogger(__name__)

NAME: Final = "state/lease.json"
BEAT_S = 10.0
STALE_S = 60.0
_PATIENCE_S = 5.0  # an unavailable storage must not keep a run from ending

_held: set[str] = set()  # the leases of this process


@dataclass(frozen=True)
class Lease:
    """A writer: `owner` is the machine on which `pid` is valid (pipeline.storage.local); `seen` is in Unix seconds."""

    id: str
    command: str
    host: str
    pid: int
    owner: str
    seen: float

    def __str__(self) -> str:
        ago = max(0.0, time.time() - self.seen)
        return f"capstan {self.command}, process {self.pid} on {self.host}, last seen {ago:.0f} s ago"


class HeldLease:
    """The lease of this process. Call `check` before removing anything that another writer might need."""

    def __init__(self, storage: Storage, command: str) -> None:
        self._storage = storage
        self._lease = Lease(uuid.uuid4().hex, command, socket.gethostname(), os.getpid(), owner(), time.time())
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="capstan-lease", daemon=True)

    def take(self) -> None:
        """Write the lease. Raises CapstanError if another process is writing this dataset."""
        if (other := _read(self._storage)) is not None:
            if not _is_stale(self._storage, other):
                raise _in_use(self._storage, other)
            log.info("%s: resuming after %s", self._storage.url, other)
        self._write()
        self.check()
        _held.add(self._lease.id)
        self._beats.start()

    def check(self) -> None:
        """Raise CapstanError if another process has overwritten this lease."""
        if (other := self._other()) is not None:
            raise _in_use(self._storage, other)

    def release(self) -> None:
        """Remove the lease if it is still this one. If that fails, the next writer may have to wait."""
        self._ended.set()
        _held.discard(self._lease.id)
        removal = threading.Thread(target=self._remove, name="capstan-lease-end", daemon=True)
        removal.start()
        removal.join(_PATIENCE_S)

    def _remove(self) -> None:
        self._beats.join()
        with contextlib.suppress(OSError, StorageError):
            if self._other() is None:
                self._storage.delete(NAME)

    def _other(self) -> Lease | None:
        """Return the lease of another process that has overwritten this one, or None."""
        current = _read(self._storage)
        return None if current is None or current.id == self._lease.id else current

    def _write(self) -> None:
        now = replace(self._lease, seen=time.time())
        self._storage.write(NAME, json.dumps(asdict(now)).encode())

    def _beat(self) -> None:
        """Rewrite the lease until released (in its own thread). Another's lease is kept: the next `check` finds it."""
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError, StorageError):  # the work itself reports an unavailable storage
                if self._other() is None and not self._ended.is_set():
                    self._write()


@contextlib.contextmanager
def lease(storage: Storage, command: str) -> Iterator[HeldLease]:
    """Hold the lease of the dataset at `storage` while the block runs; other writers are shown `command`.

    Raises CapstanError if another process holds it, naming the process, its machine and when it was last seen.
    """
    held = HeldLease(storage, command)
    held.take()
    try:
        yield held
    finally:
        held.release()


def _read(storage: Storage) -> Lease | None:
    try:
        return Lease(**json.loads(storage.read(NAME)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # of another version, or damaged: not a lease
        return None


def _is_stale(storage: Storage, other: Lease) -> bool:
    if other.owner == owner() and not (is_alive(other.pid) and (other.pid != os.getpid() or other.id in _held)):
        return True
    if 0 <= time.time() - other.seen < STALE_S:
        return False
    time.sleep(2 * BEAT_S)
    return _read(storage) in (None, other)


def _in_use(storage: Storage, other: Lease) -> CapstanError:
    return CapstanError(
        f"{storage.url} is being written by another process ({other}). Fix: wait until it ends; if it is dead already, "
        f"wait until {STALE_S:.0f} s after it was last seen. Two writers would remove each other's files"
    )
