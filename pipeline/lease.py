"""Lease: one writer at a time, of a dataset or of a part of it

    state/lease.json            the whole dataset: build, score, select, remove, export
    state/leases/<part>.json    a part: a caption layer, latents or text embeddings of one encoder

Each is {id, command, host, pid, owner, seen}, rewritten every BEAT_S, removed at the end. A whole lease excludes all
others; the leases of two parts exclude each other only if it is the same part.

Two writers at once would remove each other's staged files, since no marker of theirs names them; captions written
during a takedown would keep what it removes. So the second writer is refused. Storages do not promise a conditional
put, so this is a protocol of good faith and not a lock: each writer reads the leases back at once, and its own with
every beat and before each stage that removes files. A writer whose lease was taken over stops.

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
from urllib.parse import quote

from capstan.pipeline.dataset.damage import note_error
from capstan.pipeline.errors import CapstanError, DamagedFile, StorageError
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import is_alive, owner

log = logging.getLogger(__name__)

NAME: Final = "state/lease.json"
_PARTS: Final = "state/leases"
BEAT_S = 10.0
STALE_S = 60.0
_PATIENCE_S = 5.0  # an unavailable storage must not keep a run from ending

_held: set[str] = set()  # the leases of this process


class InUse(CapstanError):
    """Another process holds a lease that excludes this one."""


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

    def __init__(self, storage: Storage, command: str, part: str = "") -> None:
        self._storage = storage
        self._name = f"{_PARTS}/{quote(part, safe='')}.json" if part else NAME
        self._lease = Lease(uuid.uuid4().hex, command, socket.gethostname(), os.getpid(), owner(), time.time())
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="capstan-lease", daemon=True)

    def take(self, *, wait: bool = False) -> None:
        """Write the lease. Raises CapstanError if another process is writing this dataset, or the same part of it.

        With `wait`, wait until that process ends instead.
        """
        while True:
            try:
                return self._take()
            except InUse as error:
                if not wait:
                    raise
                log.info("waiting: %s", error)
            time.sleep(BEAT_S)

    def _take(self) -> None:
        self._storage.check_links()
        for name in self._excluded():
            if (other := _read(self._storage, name)) is not None:
                if not _is_stale(self._storage, name, other):
                    raise _in_use(self._storage, other)
                log.info("%s: resuming after %s", self._storage.url, other)
                if name != self._name:
                    self._storage.delete(name)
        _held.add(self._lease.id)
        self._write()
        for name in self._excluded():  # of two that start at the same moment, at least one sees the other
            other = _read(self._storage, name)
            if other is not None and other.id != self._lease.id:
                _held.discard(self._lease.id)
                if name != self._name:
                    self._storage.delete(self._name)
                raise _in_use(self._storage, other)
        self._storage.sweep()
        self._beats.start()

    def _excluded(self) -> list[str]:
        """Return the names of the leases that must not be held next to this one, its own included."""
        if self._name != NAME:
            return [NAME, self._name]
        return [NAME, *self._storage.names(_PARTS)]

    def check(self) -> None:
        """Raise CapstanError if another process has taken this lease over."""
        current = _read(self._storage, self._name)
        if current is None:
            problem = f"{self._storage.url}/{self._name} is gone: another process has taken over"
            raise CapstanError(f"{problem}. Fix: run the same command again; it resumes")
        if current.id != self._lease.id:
            raise _in_use(self._storage, current)

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
            if self._is_own():
                self._storage.delete(self._name)

    def _is_own(self) -> bool:
        current = _read(self._storage, self._name)
        return current is not None and current.id == self._lease.id

    def _write(self) -> None:
        now = replace(self._lease, seen=time.time())
        self._storage.write(self._name, json.dumps(asdict(now)).encode())

    def _beat(self) -> None:
        """Rewrite the lease until released (in its own thread). If it was taken over, the next `check` finds it."""
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError, StorageError):  # the work itself reports an unavailable storage
                if self._is_own() and not self._ended.is_set():
                    self._write()


@contextlib.contextmanager
def lease(storage: Storage, command: str, part: str = "", *, wait: bool = False) -> Iterator[HeldLease]:
    """Hold the lease of the dataset at `storage` while the block runs; other writers are shown `command`.

    With `part`, e.g. "captions/mine", only that part of the dataset is leased. With `wait`, wait for other writers.

    Raises CapstanError if another process holds it, naming the process, its machine and when it was last seen; and
    RecipeError for a link inside the dataset.
    """
    held = HeldLease(storage, command, part)
    held.take(wait=wait)
    try:
        yield held
    except DamagedFile as error:  # the next build rebuilds it
        note_error(storage, error)
        raise
    finally:
        held.release()


def writers(storage: Storage) -> list[Lease]:
    """Return who writes the dataset, or a part of it, as far as its leases tell. Takes none and waits for none."""
    found = [_read(storage, name) for name in (NAME, *storage.names(_PARTS))]
    return [one for one in found if one is not None and not _has_ended(one) and time.time() - one.seen < STALE_S]


def _read(storage: Storage, name: str) -> Lease | None:
    try:
        return Lease(**json.loads(storage.read(name)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # of another version, or damaged: not a lease
        return None


def _is_stale(storage: Storage, name: str, other: Lease) -> bool:
    if _has_ended(other):
        return True
    if 0 <= time.time() - other.seen < STALE_S:
        return False
    time.sleep(2 * BEAT_S)
    return _read(storage, name) in (None, other)


def _has_ended(other: Lease) -> bool:
    """Return whether a writer ran on this machine and has ended."""
    return other.owner == owner() and not (is_alive(other.pid) and (other.pid != os.getpid() or other.id in _held))


def _in_use(storage: Storage, other: Lease) -> InUse:
    return InUse(
        f"{storage.url} is being written by another process ({other}). Fix: wait until it ends; if it is dead already, "
        f"wait until {STALE_S:.0f} s after it was last seen. Two writers would remove each other's files"
    )
