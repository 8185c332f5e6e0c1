"""Records of submitted jobs, one JSON file per job in the user's state folder

    jobs/<id>.json   {id, target, settings, arguments, recipe, dataset, submitted, handle, ended}

A record holds the target's settings as they were at submission, so that a job can be reached after clusters.yaml has
changed. A job's status is always queried from its cluster; only its final state is stored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from capstan.cluster.jobs.clusters_file import make_target
from capstan.cluster.targets.base import Handle, State, Target
from capstan.cluster.user_dirs import state_folder
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage


@dataclass(frozen=True)
class JobRecord:
    """A submitted job."""

    id: str
    target: str
    settings: dict[str, Any]
    arguments: list[str]
    recipe: str  # absolute path of the file, "" for a command without a recipe
    dataset: str
    submitted: float  # seconds since the epoch
    handle: Handle
    ended: dict[str, Any] | None = None  # its final State

    def open(self) -> Target:
        """Return the target that the job was sent to."""
        return make_target(self.target, self.settings)


def save(record: JobRecord) -> None:
    """Write a record."""
    _storage().write(f"{record.id}.json", json.dumps(asdict(record), indent=1).encode())


def records() -> list[JobRecord]:
    """Return all records, the latest last."""
    storage = _storage()
    found = [JobRecord(**json.loads(storage.read(name))) for name in storage.names() if name.endswith(".json")]
    return sorted(found, key=lambda record: record.submitted)


def find(job: str) -> JobRecord:
    """Return the record of a job, by its id or an unambiguous start of it; `last` is the latest.

    Raises RecipeError if there is none, or several.
    """
    known = records()
    if job == "last" and known:
        return known[-1]
    chosen = [record for record in known if record.id == job] or [
        record for record in known if record.id.startswith(job)
    ]
    if len(chosen) != 1:
        problem = f"no job {job!r}" if not chosen else f"{job!r} is the start of {len(chosen)} job ids"
        raise RecipeError("JOB", problem, "see `capstan jobs list`")
    return chosen[0]


def state_of(record: JobRecord) -> State:
    """Return the job's state, queried from its cluster unless it has ended.

    Raises CapstanError if the cluster does not answer.
    """
    if record.ended is not None:
        return State(**record.ended)
    state = record.open().state(record.handle)
    if state.is_final and state.status != "lost":
        save(replace(record, ended=asdict(state)))
    return state


def still_running(recipe: Path) -> JobRecord | None:
    """Return the last job of this recipe if it may still be running."""
    mine = [record for record in records() if record.recipe == str(recipe.resolve())]
    if not mine or mine[-1].ended is not None:
        return None
    try:
        return None if state_of(mine[-1]).is_final else mine[-1]
    except CapstanError:
        return mine[-1]  # a cluster that does not answer may still be running it


def job_rows() -> Iterator[dict[str, Any]]:
    """Yield a row per job, the latest first. The status is `unknown` if the cluster does not answer."""
    for record in reversed(records()):
        try:
            state = state_of(record)
            status: tuple[str, int | None] = state.status, state.exit_code
        except CapstanError:
            status = "unknown", None
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.submitted))
        command = " ".join(record.arguments)
        row = {"job": record.id, "target": record.target, "status": status[0], "exit_code": status[1]}
        yield {**row, "submitted": when, "command": command}


def _storage() -> Storage:
    return Storage(str(state_folder() / "jobs"), field="CAPSTAN_STATE")
