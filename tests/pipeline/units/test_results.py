"""Results of units: by threads if they are few, else by workers; nothing is left of either."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest

from capstan.pipeline import units
from capstan.pipeline.config import Resources
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Unit, results

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules

PROCESSES = Resources(cpus=2, executor="processes")


class Doubles(Job):
    name = "doubles"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        if unit.spec.get("damaged"):
            raise DamagedFile(unit.id, "it is a test")
        yield {"double": 2 * unit.spec["number"], "process": os.getpid()}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        return dict(pieces[0])


def work(count: int) -> list[Unit]:
    return [Unit(f"unit-{number}", {"number": number}) for number in range(count)]


def test_few_units_are_done_in_this_process_and_in_order(storage: Storage) -> None:
    found = results(Doubles(storage), work(9), PROCESSES, progress=False)
    assert [one["double"] for one in found] == list(range(0, 18, 2))
    assert {one["process"] for one in found} == {os.getpid()}
    assert results(Doubles(storage), [], PROCESSES, progress=False) == []


def test_many_units_are_done_by_workers_and_leave_nothing(storage: Storage) -> None:
    found = results(Doubles(storage), work(units.SMALL_RUN + 1), PROCESSES, progress=False)
    assert [one["double"] for one in found] == list(range(0, 2 * units.SMALL_RUN + 2, 2))
    assert os.getpid() not in {one["process"] for one in found}
    assert storage.names() == []


@pytest.mark.parametrize("few", [True, False])
def test_a_unit_that_fails_is_an_error_that_says_why(
    storage: Storage, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "SMALL_RUN", 64 if few else 0)
    bad = Unit("unit-x", {"damaged": True})
    with pytest.raises(DamagedFile, match="it is a test") as raised:
        results(Doubles(storage), [*work(2), bad], PROCESSES, progress=False)
    assert raised.value.exit_code == 1
    assert storage.names() == []
