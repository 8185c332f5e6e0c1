"""Verdicts given in the browser → review files; takedown lists → key files"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capstan.cluster.user_dirs import state_folder
from capstan.cluster.view.leased import Kept, LeasedTables
from capstan.pipeline.config import fingerprint
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


class Reviews:
    """The reviews of one dataset; safe to call from several threads."""

    def __init__(self, tables: LeasedTables) -> None:
        self._tables, self._storage, self.who = tables, tables.storage, tables.who

    def counts(self) -> list[dict[str, Any]]:
        """Return {name, reject, keep} of every review."""
        return [{"name": name, **count(self.read(name))} for name in list_reviews(self._storage)]

    def read(self, name: str) -> pa.Table:
        """Return a review's verdicts (select.review.SCHEMA)."""
        return self._tables.read(self._kept(name))

    def give(self, name: str, verdicts: Mapping[str, Verdict]) -> tuple[dict[str, Verdict], pa.Table]:
        """Publish verdicts (key → verdict, "" for none); return those before, and the review.

        Raises CapstanError if another process writes this review or the whole dataset.
        """
        before, after = self._tables.change(self._kept(name), lambda table: changed(table, verdicts, self.who))
        return {key: Verdict("") for key in verdicts} | among(before, verdicts), after

    def _kept(self, name: str) -> Kept:
        review_file(name)
        return Kept(
            f"review-{name}",
            lambda: read_review(self._storage, name),
            lambda table: write_review(self._storage, name, table),
        )


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
