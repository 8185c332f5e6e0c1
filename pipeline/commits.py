"""Which units of a job are committed, and what was kept of each: the markers, and a log that spares reading them.

    state/<job>/done/<unit>.json          the marker: a unit is committed if it exists, and only then
    state/<job>/quarantine/<unit>.json    why a unit is not
    state/<job>/log.json                  unit → [the marker's stamp, what it says]

The log decides nothing. A marker is read from it if its stamp is still the one that the listing shows; a log that is
old, or missing, costs time only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.workers import Job, Unit

Facts = dict[str, Any]  # what `Job.commit` returned
_WORTH_LOGGING = 100  # markers that are in no log


def markers(job: Job) -> dict[str, Facts]:
    """What `commit` returned for every committed unit of this job, by unit id."""
    return _Markers(job, {}).facts


def log_markers(job: Job, fresh: Mapping[str, Facts] | None = None) -> dict[str, Facts]:
    """As `markers`, and logs them if many are in no log. `fresh` holds facts that need not be read."""
    found = _Markers(job, fresh or {})
    if found.unlogged >= _WORTH_LOGGING:
        log = {unit: [stamp, found.facts[unit]] for unit, stamp in found.stamps.items()}
        job.storage.write(_log(job), json.dumps(log, separators=(",", ":")).encode())
    return found.facts


def pending(job: Job, units: Iterable[Unit]) -> list[Unit]:
    """The units that have no marker yet. One listing."""
    done = {_unit_of(name) for name in job.storage.names(f"state/{job.name}/done")}
    return [unit for unit in units if unit.id not in done]


def mark(job: Job, unit: str, facts: Facts) -> None:
    """Commit a unit, whose outputs are all published."""
    job.storage.write(_marker(job, unit), json.dumps(facts, sort_keys=True).encode())


def forget(job: Job, units: Iterable[str]) -> None:
    """Remove the markers of these units: they will be done again."""
    job.storage.delete(*(_marker(job, unit) for unit in units))


def quarantined(job: Job) -> dict[str, str]:
    """Unit id → first line of the reason, for every unit that stands quarantined."""
    records = job.storage.read_many(job.storage.names(f"state/{job.name}/quarantine"))
    return {_unit_of(name): first_line(json.loads(data)["reason"]) for name, data in records.items()}


def quarantine(job: Job, unit: Unit, attempts: int, reason: str) -> None:
    """Keep why `unit` failed for good."""
    record = {"unit": unit.id, "spec": unit.spec, "attempts": attempts, "reason": reason}
    job.storage.write(_reason(job, unit.id), json.dumps(record).encode())


def release(job: Job, unit: str) -> None:
    """The unit is committed after all."""
    job.storage.delete(_reason(job, unit))


def first_line(reason: str) -> str:
    return reason.partition("\n")[0]


class _Markers:
    """The markers of a job: `stamps` and `facts` by unit; `unlogged` of them were not in the log."""

    def __init__(self, job: Job, fresh: Mapping[str, Facts]) -> None:
        listed = job.storage.stamps(f"state/{job.name}/done")
        self.stamps = {_unit_of(name): stamp for name, stamp in listed.items()}
        log = _read_log(job) if self.stamps else {}
        known = {unit: log[unit][1] for unit, stamp in self.stamps.items() if unit in log and log[unit][0] == stamp}
        self.unlogged = len(self.stamps) - len(known)
        known |= fresh
        unread = job.storage.read_many(_marker(job, unit) for unit in self.stamps if unit not in known)
        known |= {_unit_of(name): json.loads(data) for name, data in unread.items()}
        self.facts: dict[str, Facts] = {unit: known[unit] for unit in self.stamps}


def _read_log(job: Job) -> dict[str, Any]:
    try:
        return dict(json.loads(job.storage.read(_log(job))))
    except FileNotFoundError:
        return {}


def _log(job: Job) -> str:
    return f"state/{job.name}/log.json"


def _marker(job: Job, unit: str) -> str:
    return f"state/{job.name}/done/{unit}.json"


def _reason(job: Job, unit: str) -> str:
    return f"state/{job.name}/quarantine/{unit}.json"


def _unit_of(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".json")
