"""Which units of a job are committed, and what was kept of each: markers, one by one, then gathered in a log.

    state/<job>/done/<unit>.json          the marker of a unit, written when all its outputs are published
    state/<job>/log.json                  unit → what its marker said: many markers in one file
    state/<job>/quarantine/<unit>.json    why a unit is not committed

A unit is committed if it has a marker or stands in the log. The log is published before the markers that it takes in
are removed, so at no moment is a unit in neither; thousands of them cost one read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from capstan.pipeline.units.workers import Job, Unit

Facts = dict[str, Any]  # what `Job.commit` returned
_WORTH_GATHERING = 100  # markers


def markers(job: Job) -> dict[str, Facts]:
    """What `commit` returned for every committed unit of this job, by unit id."""
    return _read_log(job) | _read_markers(job, {})


def gather(job: Job, fresh: Mapping[str, Facts] | None = None) -> dict[str, Facts]:
    """As `markers`, and moves them into the log if there are many. `fresh`: facts that need not be read again."""
    logged, single = _read_log(job), _read_markers(job, fresh or {})
    facts = logged | single
    if len(single) >= _WORTH_GATHERING:
        _write_log(job, facts)
        job.storage.delete(*(_marker(job, unit) for unit in single))
    return facts


def mark(job: Job, unit: str, facts: Facts) -> None:
    """Commit a unit, whose outputs are all published."""
    job.storage.write(_marker(job, unit), json.dumps(facts, sort_keys=True).encode())


def forget(job: Job, units: Iterable[str]) -> None:
    """These units are committed no longer: they will be done again."""
    units, logged = set(units), _read_log(job)
    if units & logged.keys():
        _write_log(job, {unit: facts for unit, facts in logged.items() if unit not in units})
    job.storage.delete(*(_marker(job, unit) for unit in sorted(units)))


def pending(job: Job, units: Iterable[Unit]) -> list[Unit]:
    """The units that are not committed yet."""
    done = _committed(job)
    return [unit for unit in units if unit.id not in done]


def quarantined(job: Job) -> dict[str, str]:
    """Unit id → first line of the reason, for every unit that stands quarantined: one that failed only when it was
    done again does not."""
    names = job.storage.names(f"state/{job.name}/quarantine")
    done = _committed(job) if names else set()
    records = job.storage.read_many(name for name in names if _unit_of(name) not in done)
    return {_unit_of(name): first_line(json.loads(data)["reason"]) for name, data in records.items()}


def noted(job: Job) -> set[str]:
    """The units of which a reason is kept, whether they are committed or not."""
    return {_unit_of(name) for name in job.storage.names(f"state/{job.name}/quarantine")}


def quarantine(job: Job, unit: Unit, attempts: int, reason: str) -> None:
    """Keep why `unit` failed for good."""
    record = {"unit": unit.id, "spec": unit.spec, "attempts": attempts, "reason": reason}
    job.storage.write(_reason(job, unit.id), json.dumps(record).encode())


def release(job: Job, unit: str) -> None:
    """The unit is committed after all."""
    job.storage.delete(_reason(job, unit))


def first_line(reason: str) -> str:
    return reason.partition("\n")[0]


def _committed(job: Job) -> set[str]:
    return _read_log(job).keys() | {_unit_of(name) for name in _marker_names(job)}


def _read_log(job: Job) -> dict[str, Facts]:
    try:
        return dict(json.loads(job.storage.read(_log(job))))
    except FileNotFoundError:
        return {}


def _write_log(job: Job, facts: Mapping[str, Facts]) -> None:
    job.storage.write(_log(job), json.dumps(facts, separators=(",", ":"), sort_keys=True).encode())


def _read_markers(job: Job, fresh: Mapping[str, Facts]) -> dict[str, Facts]:
    names = {_unit_of(name): name for name in _marker_names(job)}
    unread = job.storage.read_many(name for unit, name in names.items() if unit not in fresh)
    read = {_unit_of(name): json.loads(data) for name, data in unread.items()}
    return {unit: fresh[unit] if unit in fresh else read[unit] for unit in names}


def _marker_names(job: Job) -> list[str]:
    return job.storage.names(f"state/{job.name}/done")


def _log(job: Job) -> str:
    return f"state/{job.name}/log.json"


def _marker(job: Job, unit: str) -> str:
    return f"state/{job.name}/done/{unit}.json"


def _reason(job: Job, unit: str) -> str:
    return f"state/{job.name}/quarantine/{unit}.json"


def _unit_of(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".json")
