"""What the workers of a run share is one object for all of them, on processes and on Ray."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import ray

from capstan.pipeline.config import Resources
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Unit, run, shared
from capstan.pipeline.units.shared import OnSocket, Served

for library in (cloudpickle, ray.cloudpickle):
    library.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules


@pytest.fixture(params=["processes", "ray"])
def resources(request: pytest.FixtureRequest) -> Resources:
    """Two CPUs, and each kind of workers in turn."""
    if request.param == "processes":
        return Resources(cpus=2, executor="processes")
    return request.getfixturevalue("ray_session")


class Tickets:
    """Numbers, each given once."""

    def __init__(self) -> None:
        self.next = 0

    def draw(self, name: str) -> tuple[str, int]:
        self.next += 1
        return name, self.next

    def spoil(self) -> None:
        raise ValueError("no such ticket")


class Drawing(Job):
    """Each unit draws five numbers."""

    name = "drawing"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def shared(self) -> Tickets:
        return Tickets()

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        tickets = shared()
        assert tickets is not None
        for _ in range(5):
            yield {"drawn": asyncio.run(tickets.call(tickets.key_of("any"), "draw", unit.id))}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        return {"drawn": [piece["drawn"] for piece in pieces]}


def test_all_workers_call_the_same_object(resources: Resources, storage: Storage) -> None:
    for times in (1, 2):  # of each run its own
        job = Drawing(storage)
        job.name = f"drawing-{times}"
        assert run(job, [Unit(str(number)) for number in range(6)], resources, progress=False).done == 6
        drawn = [tuple(draw) for facts in job.markers.read().values() for draw in facts["drawn"]]
        assert sorted(number for _, number in drawn) == list(range(1, 31))


class Spoiling(Drawing):
    """Each unit calls what fails."""

    name = "spoiling"

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        tickets = shared()
        assert tickets is not None
        asyncio.run(tickets.call(0, "spoil"))
        yield {}


def test_an_error_of_the_object_is_the_units(resources: Resources, storage: Storage) -> None:
    ended = run(Spoiling(storage), [Unit("a")], resources, attempts=1, progress=False)
    assert "no such ticket" in ended.quarantined["a"]


def test_there_is_none_outside_of_workers() -> None:
    assert shared() is None


def test_a_stranger_and_a_driver_that_has_ended_are_errors() -> None:
    served = Served(Tickets())
    worker = OnSocket(served.address, served.key)
    assert asyncio.run(worker.call(0, "draw", "a")) == ("a", 1)
    with pytest.raises(OSError, match="cannot be reached"):
        asyncio.run(OnSocket(served.address, b"guessed").call(0, "draw", "b"))
    assert asyncio.run(worker.call(0, "draw", "a")) == ("a", 2)
    served.close()
    assert not Path(served.address).exists()
    with pytest.raises(OSError, match="cannot be reached"):
        asyncio.run(OnSocket(served.address, served.key).call(0, "draw", "a"))
