"""The unit map without Ray: in this process, one unit after the other, with the same markers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from capstan.pipeline import units
from capstan.pipeline.errors import CapstanError, RecipeError


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
    counts, wanted = Counter[str](), {unit.id for unit in work}
    for facts in (facts for unit, facts in job.markers.read().items() if unit in wanted):
        counts.update({name: value for name, value in facts.items() if isinstance(value, int | float)})
    return units.Summary(len(todo), len(work) - len(todo), {}, dict(counts))


def run_all_here(
    job: units.Job, work: Iterable[units.Unit], *_: Any, redo: Collection[str] = (), **__: Any
) -> units.Summary:
    """In place of `units.run`: redoes units, and quarantines those that fail, at once."""
    work = list(work)
    done, bad = job.markers.read(), dict[str, str]()
    todo = [unit for unit in work if unit.id not in done or unit.id in redo]
    for unit in todo:
        try:
            job.markers.mark(unit.id, job.commit(unit, list(job.prepare(unit))))
            job.markers.release(unit.id)
        except CapstanError as error:
            if isinstance(error, RecipeError):
                raise
            bad[unit.id] = str(error)
            job.markers.quarantine(unit.id, unit.spec, 1, str(error))
    return units.Summary(len(todo) - len(bad), len(work) - len(todo), bad, {})
