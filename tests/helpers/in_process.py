"""The unit map without Ray: in this process, one unit after the other, with the same markers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from capstan.pipeline import units


def run_here(job: units.Job, work: Iterable[units.Unit], *_: Any, **__: Any) -> units.Summary:
    """In place of `units.run`."""
    work = list(work)
    job.storage.sweep()
    done = job.markers.read()
    todo = [unit for unit in work if unit.id not in done]
    model = job.model() if todo else None
    for unit in todo:
        pieces = [model(piece) if model else piece for piece in job.prepare(unit)]
        job.markers.mark(unit.id, job.commit(unit, pieces))
    return units.Summary(len(todo), len(work) - len(todo), {}, {})
