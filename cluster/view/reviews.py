"""Verdicts given in the browser → review files, published under a lease; takedown lists → key files

A verdict is on storage before the browser sees it as saved. The lease of a review is held while verdicts come, and
released after a pause, since a build needs the whole dataset.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import shlex
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.cluster.user_dirs import state_folder
from capstan.pipeline.config import fingerprint
from capstan.pipeline.lease import HeldLease, lease
from capstan.pipeline.select.review import (
    KEEP,
    REJECT,
    Verdict,
    changed,
    list_reviews,
    read_review,
    review_file,
    write_review,
)
from capstan.pipeline.storage import Storage

log = logging.getLogger(__name__)

IDLE_S: Final = 20.0


class Reviews:
    """The reviews of one dataset; safe to call from several threads."""

    def __init__(self, storage: Storage, idle_s: float = IDLE_S) -> None:
        self._storage, self._idle_s = storage, idle_s
        self.who = _user()
        self._lock = threading.Lock()
        self._name, self._table = "", pa.table({})  # the review whose lease is held, and its verdicts
        self._held: HeldLease | None = None
        self._leases = contextlib.ExitStack()
        self._timer: threading.Timer | None = None

    def counts(self) -> list[dict[str, Any]]:
        """Return {name, reject, keep} of every review."""
        return [{"name": name, **count(self.read(name))} for name in list_reviews(self._storage)]

    def read(self, name: str) -> pa.Table:
        """Return a review's verdicts (select.review.SCHEMA)."""
        review_file(name)
        with self._lock:
            return self._table if self._held is not None and name == self._name else read_review(self._storage, name)

    def give(self, name: str, verdicts: Mapping[str, Verdict]) -> tuple[dict[str, Verdict], pa.Table]:
        """Publish verdicts (key → verdict, "" for none); return those before, and the review.

        Raises CapstanError if another process writes this review or the whole dataset.
        """
        review_file(name)
        with self._lock:
            held = self._hold(name)
            try:
                held.check()
                before = {key: Verdict("") for key in verdicts} | among(self._table, verdicts)
                table = changed(self._table, verdicts, self.who)
                write_review(self._storage, name, table)
            except BaseException:
                self._release()
                raise
            self._table = table
            return before, table

    def _hold(self, name: str) -> HeldLease:
        """Take the lease of a review unless it is held, and read the review as it is now."""
        if self._timer is not None:
            self._timer.cancel()
        if self._held is None or name != self._name:
            self._release()
            self._held = self._leases.enter_context(lease(self._storage, "view", part=f"review-{name}"))
            try:
                self._name, self._table = name, read_review(self._storage, name)
            except BaseException:
                self._release()
                raise
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


class Takedown:
    """Keys that should be taken down: a file for `capstan remove`. Nothing is removed here."""

    def __init__(self, storage: Storage, options: Sequence[str] = ()) -> None:
        folder = state_folder() / "takedown"
        self._files, self._name = Storage(str(folder)), f"{fingerprint(storage.url)}.txt"
        file = str(folder / self._name)
        settings = [part for option in options for part in ("--set", option)]
        self._file = file
        self._command = shlex.join(["capstan", "remove", storage.url, "--keys", file, *settings])
        self._lock = threading.Lock()

    def change(self, add: Iterable[str] = (), remove: Iterable[str] = ()) -> dict[str, Any]:
        """Add and remove keys; return {keys, file, command}."""
        with self._lock:
            listed = self._keys()
            wanted = [key for key in dict.fromkeys([*listed, *add]) if key not in set(remove)]
            if wanted != listed:
                self._files.write(self._name, "".join(f"{key}\n" for key in wanted).encode())
            return {"keys": wanted, "file": self._file, "command": self._command}

    def _keys(self) -> list[str]:
        try:
            return self._files.read(self._name).decode().split()
        except FileNotFoundError:
            return []


def count(table: pa.Table) -> dict[str, int]:
    """Return the number of verdicts of each kind."""
    return {verdict: int(pc.sum(pc.equal(table["verdict"], verdict)).as_py() or 0) for verdict in (REJECT, KEEP)}


def among(table: pa.Table, keys: Iterable[str]) -> dict[str, Verdict]:
    """Return the verdicts on those of `keys` that have one."""
    found = table.filter(pc.is_in(table["key"], pa.array(list(keys), pa.string())))
    return {row["key"]: Verdict(row["verdict"], row["note"]) for row in found.to_pylist()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
