"""Markers and their log: a unit is committed in one or the other, at every moment."""

from collections.abc import Iterator
from typing import Any

import pytest

from capstan.pipeline.storage import Storage
from capstan.pipeline.units.markers import forget, gather, mark, markers, pending, quarantine, quarantined, release
from capstan.pipeline.units.workers import Job, Piece, Unit


class Nothing(Job):
    name = "nothing"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        yield {}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        return {}


@pytest.fixture
def job(storage: Storage) -> Nothing:
    return Nothing(storage)


def some(count: int, start: int = 0) -> dict[str, dict[str, int]]:
    return {f"u{number:04}": {"samples": number} for number in range(start, start + count)}


def commit(job: Job, facts: dict[str, dict[str, int]]) -> None:
    for unit, fact in facts.items():
        mark(job, unit, fact)


def test_many_markers_become_one_file(job: Nothing) -> None:
    commit(job, some(150))
    assert gather(job) == some(150) == markers(job)
    assert job.storage.names() == ["state/nothing/log.json"]
    commit(job, some(3, 150))
    assert gather(job) == some(153)
    assert len(job.storage.names()) == 4, "a few markers are not worth a new log"
    assert pending(job, [Unit("u0000"), Unit("u0151"), Unit("u0200")]) == [Unit("u0200")]


def test_killed_while_gathering_loses_nothing(job: Nothing, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(job, some(150))
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            gather(job)
    job.storage.delete("state/nothing/done/u0007.json")  # as if it had been killed after the first
    assert markers(job) == some(150)
    assert gather(job) == some(150)
    assert job.storage.names() == ["state/nothing/log.json"]


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_forgotten_units_are_pending_again(job: Nothing) -> None:
    commit(job, some(150))
    gather(job)
    commit(job, some(2, 150))
    forget(job, ["u0003", "u0151", "never there"])
    left = {unit: fact for unit, fact in some(152).items() if unit not in ("u0003", "u0151")}
    assert markers(job) == left
    mark(job, "u0003", {"samples": 99})
    assert markers(job)["u0003"] == {"samples": 99}


def test_what_the_driver_knows_is_not_read_again(job: Nothing, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(job, some(5))
    monkeypatch.setattr(Storage, "read", lambda _, name: pytest.fail(name) if "done/" in name else b"{}")
    assert gather(job, some(5)) == some(5)


def test_quarantined_units_and_their_release(job: Nothing) -> None:
    quarantine(job, Unit("bad", {"n": 1}), 3, "ValueError: bad\nTraceback")
    assert quarantined(job) == {"bad": "ValueError: bad"}
    release(job, "bad")
    assert quarantined(job) == {}
