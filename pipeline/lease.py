"""One writer of a dataset at a time: a small file in its folder says who is at it, and when that one was last seen.

    state/lease.json    {id, command, host, pid, owner, seen}; written anew every BEAT_S, removed at the end

Two at once would remove each other's staged files as files that nothing names. The second is refused. Storages promise
no conditional put, so this is a matter of good faith, not a lock: of two that start within the same moment each reads
back what stands there, at once, with every beat and before each stage that removes files; the one whose lease was
overwritten ends.

A lease is stale, and taken over, if its process was on this machine and is no more; or if it was not seen for STALE_S
and is not written anew while one watches for two beats (so that clocks which differ do no harm).
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
_PATIENCE_S = 5.0  # a storage that is out must not keep a run from ending

_held: set[str] = set()  # the leases of this process


@dataclass(frozen=True)
class Lease:
    """Who writes: `owner` is where `pid` means something (pipeline.local), `seen` is in seconds since 1970."""

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
    """The lease of this process. `check` it before anything is removed that another writer might need."""

    def __init__(self, storage: Storage, command: str) -> None:
        self._storage = storage
        self._lease = Lease(uuid.uuid4().hex, command, socket.gethostname(), os.getpid(), owner(), time.time())
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="capstan-lease", daemon=True)

    def take(self) -> None:
        """Raises CapstanError if another process writes this dataset."""
        if (other := _read(self._storage)) is not None:
            if not _is_stale(self._storage, other):
                raise _in_use(self._storage, other)
            log.info("%s: going on where %s left off", self._storage.url, other)
        self._write()
        self.check()
        _held.add(self._lease.id)
        self._beats.start()

    def check(self) -> None:
        """Raises CapstanError if another process has written over this lease."""
        if (other := self._other()) is not None:
            raise _in_use(self._storage, other)

    def release(self) -> None:
        """Remove the lease, if it is still this one; where that fails, the next writer may have to wait."""
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
        """What another process has written over this lease."""
        found = _read(self._storage)
        return None if found is None or found.id == self._lease.id else found

    def _write(self) -> None:
        now = replace(self._lease, seen=time.time())
        self._storage.write(NAME, json.dumps(asdict(now)).encode())

    def _beat(self) -> None:
        """Runs in a thread of its own, and never writes over another's lease: the work's next `check` then ends it."""
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError, StorageError):  # a storage that is out stops the work, which says why
                if self._other() is None and not self._ended.is_set():
                    self._write()


@contextlib.contextmanager
def lease(storage: Storage, command: str) -> Iterator[HeldLease]:
    """Be the only writer of the dataset at `storage` while the block runs; `command` is told to others.

    Raises CapstanError, naming the process, its machine and when it was last seen, if there is another.
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
    except (ValueError, TypeError):  # of another version, or damaged: as good as none
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
        f"{storage.url} is being written by another process ({other}). Fix: wait for its end; if it is dead already, "
        f"wait {STALE_S:.0f} s from when it was last seen. Two at once would remove each other's files"
    )
