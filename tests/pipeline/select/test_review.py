"""Reviews: verdicts that are changed, taken back and published, and the step that follows them."""

from __future__ import annotations

import datetime

import pyarrow as pa
import pytest
from staged_rows import key, outcomes, recipe, stage, survivors
from takedowns import scrub

from capstan.pipeline.config import Condition, fingerprint
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.pack.job import selection_of
from capstan.pipeline.select.decide import decide
from capstan.pipeline.select.review import (
    SCHEMA,
    Verdict,
    changed,
    list_reviews,
    read_review,
    rejected_keys,
    verify_reviews,
    write_review,
)
from capstan.pipeline.storage import Storage

KEYS = [key("0000-000000", number) for number in range(6)]


def review(storage: Storage, name: str, **verdicts: str) -> None:
    """Give verdicts on rows, named r0, r1, …"""
    given = {KEYS[int(row[1:])]: Verdict(verdict) for row, verdict in verdicts.items()}
    write_review(storage, name, changed(read_review(storage, name), given, "somebody"))


def test_verdicts_are_changed_and_taken_back(storage: Storage) -> None:
    review(storage, "mine", r3="reject", r1="reject", r2="keep")
    assert list_reviews(storage) == ["mine"]
    assert rejected_keys(storage, "mine").to_pylist() == sorted([KEYS[1], KEYS[3]])
    review(storage, "mine", r3="", r2="reject")
    table = read_review(storage, "mine")
    assert table.schema.equals(SCHEMA)
    assert dict(zip(table["key"].to_pylist(), table["verdict"].to_pylist(), strict=True)) == {
        KEYS[1]: "reject",
        KEYS[2]: "reject",
    }
    assert set(table["who"].to_pylist()) == {"somebody"}
    assert all(isinstance(when, datetime.datetime) for when in table["when"].to_pylist())


def test_the_step_rejects_what_the_review_rejects(storage: Storage) -> None:
    unit = stage(storage, "0000-000000", [{"width": 10 * n} for n in range(6)])
    review(storage, "mine", r0="reject", r3="reject", r4="keep")
    assert survivors(storage, [unit], {"review": "mine"}) == [1, 2, 4, 5]
    large = {"name": "large", "where": "width >= 20"}
    decisions = decide(recipe(select=[large, {"review": "mine"}]), storage, [unit])
    assert [row[:2] for row in outcomes(decisions)] == [
        *[("rejected", "large")] * 2,
        ("kept", ""),
        ("rejected", "review"),
        *[("kept", "")] * 2,
    ]
    assert decisions.funnel[3] == {"step": "review", "left": 3, "lost": 1}
    two = {"name": "two", "at_most": 2, "per": "1"}  # sees what the review left
    assert survivors(storage, [unit], {"name": "by-eye", "review": "mine"}, two) == [1, 2]
    assert survivors(storage, [unit], two, {"name": "by-eye", "review": "mine"}) == [1]


def test_a_review_that_is_not_there_is_named(storage: Storage) -> None:
    unit = stage(storage, "0000-000000", [{}])
    with pytest.raises(RecipeError, match="no review 'mine'"):
        decide(recipe(select=[{"review": "mine"}]), storage, [unit])
    review(storage, "other", r0="keep")
    with pytest.raises(RecipeError, match=r"select\.review\.review.*use one of other"):
        decide(recipe(select=[{"review": "mine"}]), storage, [unit])


def test_the_selection_changes_with_a_verdict_and_with_nothing_else(storage: Storage) -> None:
    unit = stage(storage, "0000-000000", [{}] * 6)
    review(storage, "mine", r0="reject")
    asked = recipe(select=[{"review": "mine"}])
    before = selection_of(asked, storage, [unit])
    review(storage, "mine", r2="keep", r0="reject")  # another time of day, another row kept: the same selection
    assert selection_of(asked, storage, [unit]) == before
    review(storage, "mine", r1="reject")
    assert selection_of(asked, storage, [unit]) != before


def test_recipes_without_a_review_keep_their_hash() -> None:
    plain = {"name": "size", "where": "width > 3"}
    nothing = {"at_most": None, "balance": None, "top": None, "per": None, "by": None, "at_least": 1}
    assert fingerprint([Condition.model_validate(plain).model_dump(mode="json")]) == fingerprint([plain | nothing])


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ({"review": "../../etc"}, "pattern"),
        ({"review": "a", "where": "true"}, "one of where"),
        ({"name": "x", "review": "a", "by": "width"}, "does not take by"),
    ],
)
def test_steps_that_cannot_be(step: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Condition.model_validate(step)


def rows(**columns: list[object]) -> pa.Table:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    plain: dict[str, list[object]] = {"key": [*KEYS[:2]], "verdict": ["keep"] * 2, "note": [""] * 2, "who": [""] * 2}
    return pa.table({**plain, "when": [now] * 2, **columns}).cast(SCHEMA)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (rows(key=[KEYS[1], KEYS[0]]), "not sorted"),
        (rows(key=[KEYS[0], KEYS[0]]), "twice"),
        (rows(key=["x", "y"]), "hexadecimal"),
        (rows(verdict=["keep", "drop"]), "neither"),
        (pa.table({"key": KEYS}), "columns"),
    ],
)
def test_verify_names_a_damaged_review(storage: Storage, table: pa.Table, problem: str) -> None:
    review(storage, "good", r0="keep")
    assert verify_reviews(storage) == []
    storage.write_table("review/bad.parquet", table)
    (found,) = verify_reviews(storage)
    assert found.startswith("review/bad.parquet: damaged")
    assert problem in found
    with pytest.raises(DamagedFile, match=problem):
        read_review(storage, "bad")
    data = bytearray(storage.read("review/good.parquet"))
    data[20] ^= 0xFF
    storage.write("review/good.parquet", bytes(data))
    assert any(line.startswith("review/good.parquet: damaged") for line in verify_reviews(storage))


def test_a_takedown_removes_verdicts_and_notes(storage: Storage) -> None:
    write_review(storage, "mine", changed(SCHEMA.empty_table(), {KEYS[0]: Verdict("reject", "shows a face")}, "me"))
    scrub(storage, KEYS[0])
    assert len(read_review(storage, "mine")) == 0
    assert b"face" not in storage.read("review/mine.parquet")
