"""What was submitted: one note a job, in the user's state folder, by which it is found again.

    jobs/<id>.json   {id, target, settings, arguments, recipe, dataset, submitted, handle, ended}

A note holds the target's settings as they were, so that a job is reached although clusters.yaml has changed since. How
a job is, is always asked of its cluster; only how it ended is kept.
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
class Note:
    """A job that was submitted."""

    id: str
    target: str
    settings: dict[str, Any]
    arguments: list[str]
    recipe: str  # the file's absolute path, "" for a command without one
    dataset: str
    submitted: float  # seconds since the epoch
    handle: Handle
    ended: dict[str, Any] | None = None  # its final State

    def open(self) -> Target:
        return make_target(self.target, self.settings)


def keep(note: Note) -> None:
    """Write a note down."""
    _storage().write(f"{note.id}.json", json.dumps(asdict(note), indent=1).encode())


def notes() -> list[Note]:
    """All notes, the latest last."""
    storage = _storage()
    found = [Note(**json.loads(storage.read(name))) for name in storage.names() if name.endswith(".json")]
    return sorted(found, key=lambda note: note.submitted)


def find(job: str) -> Note:
    """The note of a job, by its id or by the only one that begins so; `last` is the latest.

    Raises RecipeError where there is none.
    """
    known = notes()
    if job == "last" and known:
        return known[-1]
    chosen = [note for note in known if note.id == job] or [note for note in known if note.id.startswith(job)]
    if len(chosen) != 1:
        problem = f"no job {job!r}" if not chosen else f"{job!r} begins the ids of {len(chosen)} jobs"
        raise RecipeError("JOB", problem, "see `capstan jobs list`")
    return chosen[0]


def state_of(note: Note) -> State:
    """How the job is; asked of its cluster unless it is known to have ended. Raises CapstanError if that is silent."""
    if note.ended is not None:
        return State(**note.ended)
    state = note.open().state(note.handle)
    if state.is_final and state.status != "lost":
        keep(replace(note, ended=asdict(state)))
    return state


def still_running(recipe: Path) -> Note | None:
    """The last job of this recipe, if it has not ended as far as its cluster says."""
    mine = [note for note in notes() if note.recipe == str(recipe.resolve())]
    if not mine or mine[-1].ended is not None:
        return None
    try:
        return None if state_of(mine[-1]).is_final else mine[-1]
    except CapstanError:
        return mine[-1]  # a cluster that does not answer may well be working


def listed() -> Iterator[dict[str, Any]]:
    """A row for each job, the latest first; a cluster that does not answer is `unknown`."""
    for note in reversed(notes()):
        try:
            state = state_of(note)
            told: tuple[str, int | None] = state.status, state.exit_code
        except CapstanError:
            told = "unknown", None
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(note.submitted))
        command = " ".join(note.arguments)
        row = {"job": note.id, "target": note.target, "status": told[0], "exit_code": told[1]}
        yield {**row, "submitted": when, "command": command}


def _storage() -> Storage:
    return Storage(str(state_folder() / "jobs"), field="CAPSTAN_STATE")
