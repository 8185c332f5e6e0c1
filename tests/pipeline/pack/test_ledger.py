"""Ledger tables: only those whose rows are decided differently, and their decisions on the way to the workers."""

from pathlib import Path

import pytest
from staged_rows import outcomes, recipe, stage

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.pack import ledger as ledger_module
from capstan.pipeline.pack.ledger import WriteLedger, ledger_name
from capstan.pipeline.select.decide import Decisions, decide
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Unit, run


def wide(least: int) -> Recipe:
    return recipe(
        select=[{"name": "wide", "where": f"width >= {least}"}],
        dedup={"perceptual": None},
        resources={"executor": "processes", "cpus": 1},
    )


@pytest.fixture
def units(storage: Storage) -> list[Staged]:
    """Units of two rows whose widths are 10, 11; 20, 21; …"""
    rows = [[{"width": 10 * number}, {"width": 10 * number + 1}] for number in range(1, 6)]
    return [stage(storage, f"0000-{number:06d}", own) for number, own in enumerate(rows)]


def write(storage: Storage, asked: Recipe, units: list[Staged]) -> tuple[Decisions, list[str]]:
    """Write the ledger; return the decisions and the units whose tables were written."""
    decisions, job = decide(asked, storage, units), WriteLedger(asked, storage, [])
    wanted = job.units(decisions)
    job.forget_stale(wanted)
    handed = job.handed_over(wanted, decisions)
    run(job, handed, asked.resources, progress=False)
    job.forget()
    return decisions, [unit.spec["unit"] for unit in handed if "decided" in unit.spec]


def test_only_tables_whose_rows_are_decided_differently_are_written(storage: Storage, units: list[Staged]) -> None:
    decisions, written = write(storage, wide(0), units)
    assert written == [unit.unit for unit in units]
    for least, changed in ((21, [0, 1]), (21, []), (12, [1])):
        decisions, written = write(storage, wide(least), units)
        assert written == [units[number].unit for number in changed]
    listed = [storage.read_table(ledger_name(unit.unit), ["outcome"])["outcome"].to_pylist() for unit in units]
    assert [row[0] for row in outcomes(decisions)] == [outcome for own in listed for outcome in own]


@pytest.mark.parametrize("size", [1, 8 << 20])
def test_decisions_are_in_files_and_gone_once_tables_are_written(
    size: int, storage: Storage, units: list[Staged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_FILE_BYTES", size)
    decisions, job = decide(wide(25), storage, units), WriteLedger(wide(25), storage, [])
    wanted = job.units(decisions)
    handed = job.handed_over(wanted, decisions)
    assert [unit.id for unit in handed] == [unit.id for unit in wanted]
    assert len(storage.names("state/decisions")) == (2 if size == 1 else 1)  # equal decisions share a file
    assert all(len(str(unit.spec)) < 1000 for unit in handed)  # what travels does not grow with the rows
    run(job, handed, wide(25).resources, progress=False)
    assert len(job.entries(wanted)) == 5
    job.forget()
    assert storage.names("state/decisions") == []


def test_damaged_decisions_are_not_used(storage: Storage, units: list[Staged]) -> None:
    decisions, job = decide(wide(0), storage, units), WriteLedger(wide(0), storage, [])
    handed: list[Unit] = job.handed_over(job.units(decisions), decisions)
    (name,) = storage.names("state/decisions")
    path = Path(storage.path(name))
    data = bytearray(path.read_bytes())
    data[handed[2].spec["decided"]["start"] + 40] ^= 1
    path.write_bytes(data)
    list(job.prepare(handed[1]))
    with pytest.raises(DamagedFile, match="not that of the decisions"):
        list(job.prepare(handed[2]))
