"""Rewriting on workers what holds removed rows."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from takedowns import contents, listed, recipe_for, storage_of

from capstan.pipeline import build, units
from capstan.pipeline.config import Blocklist
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.pack import scrub, scrub_units
from capstan.pipeline.units import Job, MarkerLog, Unit


def twice(job: Job, work: list[Unit], *_: object, **__: object) -> list[dict[str, Any]]:
    """As if each worker died at the end of a unit, and another did it again."""
    for unit in work:
        job.commit(unit, list(job.prepare(unit)))
    return [job.commit(unit, list(job.prepare(unit))) for unit in work]


@pytest.mark.integration
@pytest.mark.parametrize("how", ["workers", "repeated"])
def test_workers_leave_what_threads_leave(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    build.build(recipe_for(folder, score={"caption": {}}), progress=False)
    storage, before = storage_of(folder), Dataset(storage_of(folder)).manifest
    for entry in before.shards:
        MarkerLog(storage, "recaption-mine").mark(entry.name, {"source": entry.sha256})
    lists = Blocklist(domains=listed(folder, "example1.org"))
    shutil.copytree(folder, folder / "threads")
    build.remove(storage_of(folder / "threads").url, lists, progress=False)
    if how == "workers":
        monkeypatch.setattr(units, "SMALL_RUN", 0)
        monkeypatch.setattr(units, "_on_ray", lambda *_: False)
    else:
        monkeypatch.setattr(scrub_units, "results", twice)
        monkeypatch.setattr(scrub, "results", twice)
    build.remove(storage.url, lists, progress=False)
    ours, theirs = contents(storage), contents(storage_of(folder / "threads"))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and not name.startswith("state/lookup/")] == []
