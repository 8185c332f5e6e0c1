"""Verdicts on pairs: changed and taken back, honoured by the search for duplicates, verified, and taken down."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from staged_rows import key, outcomes, recipe, stage
from takedowns import scrub

from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.pack.job import selection_of
from capstan.pipeline.select.decide import decide
from capstan.pipeline.select.pairs import FILE, SCHEMA, among, changed, pair, read_pairs, verify_pairs, write_pairs
from capstan.pipeline.storage import Storage

UNIT = "0000-000000"
KEYS = [key(UNIT, number) for number in range(6)]
NEAR = [{"phash": 0}, {"phash": 3}, {"phash": 0}, {"phash": 2**40 - 1}]  # 0, 1 and 2 are near each other


def judge(storage: Storage, verdict: str, *pairs: tuple[int, int]) -> None:
    given = {pair(KEYS[a], KEYS[b]): verdict for a, b in pairs}
    write_pairs(storage, changed(read_pairs(storage), given, "somebody"))


def kept_of(storage: Storage, rows: list[dict[str, Any]], **dedup: Any) -> list[int | None]:
    """The row that each row repeats, or None."""
    decisions = decide(recipe(dedup={"colours": None, **dedup}), storage, [stage(storage, UNIT, rows)])
    return [KEYS.index(detail) if detail else None for _, _, detail, _ in outcomes(decisions)]


def test_verdicts_are_changed_and_taken_back(storage: Storage) -> None:
    judge(storage, "different", (3, 1), (0, 1))
    judge(storage, "same", (1, 3), (2, 4))
    assert among(read_pairs(storage), KEYS[:4]) == {pair(*KEYS[:2]): "different", pair(KEYS[1], KEYS[3]): "same"}
    judge(storage, "", (1, 3), (0, 2))
    table = read_pairs(storage)
    assert table.schema.equals(SCHEMA)
    assert [(row["a"], row["verdict"], row["who"]) for row in table.to_pylist()] == [
        (KEYS[0], "different", "somebody"),
        (KEYS[2], "same", "somebody"),
    ]
    assert verify_pairs(storage) == []


def test_rows_of_a_pair_that_is_different_are_both_kept(storage: Storage) -> None:
    assert kept_of(storage, NEAR, perceptual=4) == [None, 0, 0, None]
    judge(storage, "same", (0, 2))
    judge(storage, "different", (0, 1))
    assert kept_of(storage, NEAR, perceptual=4) == [None, None, 0, None]
    judge(storage, "different", (2, 0))
    assert kept_of(storage, NEAR, perceptual=4) == [None, None, 1, None]  # nobody has said that 1 and 2 are different
    judge(storage, "different", (1, 2))
    assert kept_of(storage, NEAR, perceptual=4) == [None, None, None, None]


@pytest.mark.parametrize("perceptual", [None, 4])
def test_equal_files_that_are_different_are_both_kept(storage: Storage, perceptual: int | None) -> None:
    rows = [{"sha256": "ab" * 32, "phash": 7}] * 4
    judge(storage, "different", (0, 1))
    assert kept_of(storage, rows, perceptual=perceptual) == [None, None, 0, 0]
    decisions = decide(recipe(dedup={"perceptual": perceptual}), storage, [stage(storage, UNIT, rows)])
    assert {reason for _, reason, _, _ in outcomes(decisions)} == {"", "exact"}


def test_what_it_is_equal_to_may_repeat_the_other_of_a_pair(storage: Storage) -> None:
    """Row 2 is the same file as row 1, which repeats row 0; somebody looked at 0 and 2."""
    rows = [{"phash": 0}, {"phash": 3, "sha256": "ab" * 32}, {"phash": 3, "sha256": "ab" * 32}]
    assert kept_of(storage, rows, perceptual=4) == [None, 0, 0]
    judge(storage, "different", (0, 2))
    assert kept_of(storage, rows, perceptual=4) == [None, 0, None]


def test_the_selection_changes_with_what_is_different_and_with_nothing_else(storage: Storage) -> None:
    unit = stage(storage, UNIT, NEAR)
    before = selection_of(recipe(), storage, [unit])
    judge(storage, "same", (0, 1))
    assert selection_of(recipe(), storage, [unit]) == before
    judge(storage, "different", (0, 1))
    assert selection_of(recipe(), storage, [unit]) != before
    judge(storage, "", (0, 1))
    assert selection_of(recipe(), storage, [unit]) == before


def rows(**columns: list[object]) -> pa.Table:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    plain: dict[str, list[object]] = {"a": [*KEYS[:2]], "b": [*KEYS[2:4]], "verdict": ["same"] * 2, "who": [""] * 2}
    return pa.table({**plain, "when": [now] * 2, **columns}).cast(SCHEMA)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (rows(a=[KEYS[1], KEYS[0]]), "not sorted"),
        (rows(a=[KEYS[0]] * 2, b=[KEYS[1]] * 2), "twice"),
        (rows(a=["x", "y"]), "hexadecimal"),
        (rows(a=[KEYS[2], KEYS[3]]), "not in order"),
        (rows(verdict=["same", "drop"]), "neither"),
        (pa.table({"a": KEYS}), "columns"),
    ],
)
def test_verify_names_damaged_verdicts(storage: Storage, table: pa.Table, problem: str) -> None:
    storage.write_table(FILE, table)
    (found,) = verify_pairs(storage)
    assert found.startswith(f"{FILE}: damaged")
    assert problem in found
    with pytest.raises(DamagedFile, match=problem):
        decide(recipe(), storage, [stage(storage, UNIT, NEAR)])


def test_a_takedown_removes_the_pairs_of_a_row(storage: Storage) -> None:
    judge(storage, "different", (0, 1), (1, 2), (3, 4))
    scrub(storage, KEYS[1])
    assert read_pairs(storage)["a"].to_pylist() == [KEYS[3]]


def test_keys_that_end_in_zeros_are_found(storage: Storage) -> None:
    from capstan.pipeline.select.pairs import apart

    keys = np.array([bytes(16), bytes(15) + b"\1", b"\2" + bytes(15)], "S16")
    given = {pair("0" * 32, "02" + "0" * 30): "different"}
    write_pairs(storage, changed(read_pairs(storage), given, "somebody"))
    assert apart(storage, keys).pairs.tolist() == [[0, 2]]
