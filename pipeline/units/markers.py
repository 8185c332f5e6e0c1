"""Which units of a job are committed, and what is kept of each

    state/<job>/done/<unit>.json          the marker of a unit, written when all its outputs are published
    state/<job>/done/batches/<sum>.json   unit → the content of its marker: of units that ended at the same time
    state/<job>/log.json                  the same, of all units before
    state/<job>/quarantine/<unit>.json    why a unit is not committed

A unit is committed if it has a marker or is listed in a batch or in the log. The log is published before the markers
and batches that it contains are removed, so at no moment is a unit in none. Thousands of markers cost one read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from capstan.pipeline.errors import DamagedFile, first_line
from capstan.pipeline.storage import Storage

log = logging.getLogger(__name__)

Facts = dict[str, Any]  # what `Job.commit` returned
_GATHER_FROM = 100  # markers
_READS = 8  # of all markers, if some vanish meanwhile
_BATCH_FROM = 8  # units that ended at the same time; fewer have a marker each


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


U = TypeVar("U", bound=_HasId)


@dataclass(frozen=True)
class MarkerLog:
    """The markers of the job called `name`, in `storage`. It needs no job: any floor may read another's by its name."""

    storage: Storage
    name: str

    def read(self, known: Mapping[str, Facts] | None = None) -> dict[str, Facts]:
        """Return what `commit` returned for every committed unit of this job, by unit id.

        `known` holds facts that need not be read again.
        """
        for _ in range(_READS):
            batches, markers = self._files()
            with contextlib.suppress(FileNotFoundError):  # another process has just gathered it
                return self._read_log() | self._read_batches(batches) | self._read_markers(markers, known or {})
        raise DamagedFile(self.storage.path(f"state/{self.name}"), "markers that are listed cannot be read")

    def gather(self, fresh: Mapping[str, Facts] | None = None) -> dict[str, Facts]:
        """Return the same as `read`, and move the markers into the log if there are many, or a batch.

        `fresh` holds facts that need not be read again.
        """
        batches, markers = self._files()
        single = self._read_markers(markers, fresh or {})
        facts = self._read_log() | self._read_batches(batches) | single
        if batches or len(single) >= _GATHER_FROM:
            self._write_log(facts)
            self.storage.delete(*batches, *(name for name in markers if _unit_of(name) in facts))
        return facts

    def mark(self, unit: str, facts: Facts) -> None:
        """Commit a unit whose outputs are all published."""
        self.storage.write(self._marker(unit), json.dumps(facts, sort_keys=True).encode())

    def mark_all(self, facts: Mapping[str, Facts], *, again: Collection[str] = ()) -> None:
        """Commit units whose outputs are all published: many by one file.

        Those that are committed `again` have a marker each, which comes after all that was written before.
        """
        new = {unit: content for unit, content in facts.items() if unit not in again}
        if len(new) < _BATCH_FROM:
            new = {}
        else:
            data = _json(new)
            self.storage.write(self._batch(f"{hashlib.sha256(data).hexdigest()[:32]}.json"), data)
        for unit in facts.keys() - new.keys():
            self.mark(unit, facts[unit])

    def forget(self, units: Iterable[str]) -> None:
        """Remove the markers of these units, so that they will be done again."""
        units = set(units)
        if self._files()[0]:
            self.gather()
        logged = self._read_log()
        if units & logged.keys():
            self._write_log({unit: facts for unit, facts in logged.items() if unit not in units})
        self.storage.delete(*(self._marker(unit) for unit in sorted(units)))

    def clear(self) -> None:
        """Remove all that is kept of the job's units. The log goes first: it must not outlive what is newer than it."""
        self.storage.delete(self._log)
        self.storage.delete(*self.storage.names(f"state/{self.name}"))

    def pending(self, units: Iterable[U]) -> list[U]:
        """Return the units that are not committed yet."""
        done = self._committed()
        return [unit for unit in units if unit.id not in done]

    # Quarantine --------------------------------------------------------------------------------------------------

    def quarantined(self) -> dict[str, str]:
        """Return unit id → first line of the reason, for every quarantined unit.

        A committed unit that failed only when it was done again is not one.
        """
        names = self._reasons()
        done = self._committed() if names else set()
        records = self.storage.read_many(name for name in names if _unit_of(name) not in done)
        return {_unit_of(name): _reason_in(data) for name, data in records.items()}

    def noted(self) -> set[str]:
        """Return the units for which a reason is kept, whether they are committed or not."""
        return {_unit_of(name) for name in self._reasons()}

    def quarantine(self, unit: str, spec: Mapping[str, Any], attempts: int, reason: str) -> None:
        """Keep the reason for which a unit failed for good."""
        record = {"unit": unit, "spec": spec, "attempts": attempts, "reason": reason}
        self.storage.write(self._reason(unit), json.dumps(record).encode())

    def release(self, unit: str) -> None:
        """Remove the reason of a unit that is committed after all."""
        self.storage.delete(self._reason(unit))

    # Files -------------------------------------------------------------------------------------------------------

    def _committed(self) -> set[str]:
        return set(self.read())

    def _read_log(self) -> dict[str, Facts]:
        try:
            return self.storage.read_json(self._log, "remove this file: the units that it lists are done again")
        except FileNotFoundError:
            return {}

    def _write_log(self, facts: Mapping[str, Facts]) -> None:
        self.storage.write(self._log, _json(facts))

    def _read_batches(self, batches: list[str]) -> dict[str, Facts]:
        facts: dict[str, Facts] = {}
        for name, data in self.storage.read_many(batches).items():
            facts |= self._facts_in(name, data) or {}
        return facts

    def _read_markers(self, markers: list[str], fresh: Mapping[str, Facts]) -> dict[str, Facts]:
        names = {_unit_of(name): name for name in markers}
        unread = self.storage.read_many(name for unit, name in names.items() if unit not in fresh)
        read = {_unit_of(name): self._facts_in(name, data) for name, data in unread.items()}
        known = {unit: facts for unit, facts in read.items() if facts is not None} | dict(fresh)
        return {unit: known[unit] for unit in names if unit in known}

    def _facts_in(self, name: str, data: bytes) -> Facts | None:
        """Return the content of a marker or batch; None if it is damaged, so that its units are done again."""
        try:
            facts = json.loads(data)
        except ValueError:
            facts = None
        if isinstance(facts, dict):
            return facts
        log.warning("%s is damaged: what it lists is done again", self.storage.path(name))
        return None

    def _files(self) -> tuple[list[str], list[str]]:
        """Return the names of batches and of markers, by one listing."""
        names, folder = self.storage.names(f"state/{self.name}/done"), self._batch("")
        return [name for name in names if name.startswith(folder)], [n for n in names if not n.startswith(folder)]

    def _reasons(self) -> list[str]:
        return self.storage.names(f"state/{self.name}/quarantine")

    def _batch(self, file: str) -> str:
        return f"state/{self.name}/done/batches/{file}"

    @property
    def _log(self) -> str:
        return f"state/{self.name}/log.json"

    def _marker(self, unit: str) -> str:
        return f"state/{self.name}/done/{unit}.json"

    def _reason(self, unit: str) -> str:
        return f"state/{self.name}/quarantine/{unit}.json"


def _json(facts: Mapping[str, Facts]) -> bytes:
    return json.dumps(facts, separators=(",", ":"), sort_keys=True).encode()


def _reason_in(data: bytes) -> str:
    """Return the reason in a quarantine record."""
    try:
        return first_line(str(json.loads(data)["reason"]))
    except (ValueError, TypeError, KeyError):
        return "its record is damaged"


def _unit_of(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".json")
