"""Laws in operations on storage: the measurement runs, and what a change costs does not grow with what is there."""

from __future__ import annotations

from typing import Any

import pytest
from repo import ROOT

from capstan.pipeline import units


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import operations

    monkeypatch.setattr(units, "ProcessWorkers", operations.Here)
    monkeypatch.setattr(units, "SMALL_RUN", 10**9)
    return operations


@pytest.mark.integration
def test_a_takedown_costs_the_same_in_a_larger_dataset(operations: Any) -> None:
    assert operations.of_takedown(16) == operations.of_takedown(40)


@pytest.mark.integration
def test_another_condition_costs_what_it_changes(operations: Any) -> None:
    small, large = operations.of_rows(20), operations.of_rows(60)
    for law in ("new", "condition4", "read4"):  # of 20 units, 16 rows share some
        assert small[law] == large[law]
