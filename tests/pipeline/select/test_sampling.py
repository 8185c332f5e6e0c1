"""Sampling steps: at_most, balance and top; whatever parts their rows are compared in."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from staged_rows import outcomes, recipe, scored, stage, survivors

from capstan.pipeline.config import Condition, Recipe, validate
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.select.arrays import large_arrays, partitions
from capstan.pipeline.select.conditions import PASSED, QueryResult
from capstan.pipeline.select.decide import decide
from capstan.pipeline.select.sampling import sample
from capstan.pipeline.storage import Storage


def test_at_most_n_rows_per_domain(storage: Storage) -> None:
    hosts = ["a", "b", "a", "a", "c", "b", "a"]
    unit = stage(storage, "0000-000000", [{"url": f"http://{host}/{n}"} for n, host in enumerate(hosts)])
    unit = scored(storage, unit, [0.1, 0.2, None, 0.9, 0.5, 0.2, 0.3])
    few = {"name": "few", "at_most": 2, "per": "domain"}
    assert survivors(storage, [unit], few) == [0, 1, 2, 4, 5]
    assert survivors(storage, [unit], few | {"by": "clip_score"}) == [1, 3, 4, 5, 6]
    assert survivors(storage, [unit], few | {"at_most": 3, "by": "clip_score"}) == [0, 1, 3, 4, 5, 6]
    assert survivors(storage, [unit], few | {"at_most": 4, "by": "clip_score"}) == list(range(7))
    # New rows displace none of an earlier batch.
    new = scored(storage, stage(storage, "0001-000000", [{"url": "http://a/9"}, {"url": "http://c/9"}]), [0.99, 0.1])
    assert survivors(storage, [unit, new], few | {"by": "clip_score"}) == [1, 3, 4, 5, 6, 8]


def test_each_step_sees_the_rows_that_earlier_steps_left(storage: Storage) -> None:
    rows = [{"url": "http://a/", "width": 10 * n} for n in range(6)]
    unit = scored(storage, stage(storage, "0000-000000", rows), [0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    large = {"name": "large", "where": "width >= 20"}
    best = {"name": "best", "top": 0.5, "by": "clip_score"}
    assert survivors(storage, [unit], large, best) == [2, 3]
    assert survivors(storage, [unit], best, large) == [2]
    decisions = decide(recipe(select=[best, large], score={"clip": {}}), storage, [unit])
    assert [(step["step"], step["lost"]) for step in decisions.funnel[2:4]] == [("best", 3), ("large", 2)]
    assert [row[:2] for row in outcomes(decisions)] == [("rejected", "large")] * 2 + [("kept", "")] + [
        ("rejected", "best")
    ] * 3


def test_the_top_share_is_rounded_up_and_ties_go_by_key(storage: Storage) -> None:
    unit = scored(storage, stage(storage, "0000-000000", [{}] * 7), [0.5, None, 0.5, 0.5, 0.9, 0.5, 0.5])
    assert survivors(storage, [unit], {"name": "best", "top": 0.5, "by": "clip_score"}) == [0, 2, 4]
    assert survivors(storage, [unit], {"name": "best", "top": 1, "by": "clip_score"}) == [0, 2, 3, 4, 5, 6]
    thirty = stage(storage, "0001-000000", [{"width": n} for n in range(30)])
    assert survivors(storage, [thirty], {"name": "best", "top": 0.1, "by": "width"}) == [27, 28, 29]
    halves = {"name": "best", "top": 0.5, "per": "width % 3", "by": "width"}
    assert survivors(storage, [thirty], halves) == list(range(15, 30))


def test_balance_keeps_equal_counts(storage: Storage) -> None:
    unit = stage(storage, "0000-000000", [{"caption": c} for c in "aababacb"])
    even = {"name": "even", "balance": "caption"}
    assert survivors(storage, [unit], even) == [0, 2, 6]
    assert survivors(storage, [unit], even | {"at_least": 3}) == [0, 1, 2, 3, 4, 6, 7]
    assert survivors(storage, [unit], {"name": "no-c", "where": "caption <> 'c'"}, even) == [0, 1, 2, 3, 4, 7]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"at_most": 3}, "x has at_most without per"),
        ({"top": 0.5}, "x has top without by"),
        ({"where": "true", "by": "width"}, "x has where, which does not take by"),
        ({"where": "true", "top": 0.5}, "found: where, top"),
        ({}, "found: none"),
        ({"at_most": 3, "per": "domian"}, "select.x.per: no column 'domian'.*did you mean domain"),
        ({"top": 0.5, "by": "caption"}, "select.x.by: Conversion Error"),
        ({"balance": "width +"}, "select.x.balance: the SQL ends too early"),
    ],
)
def test_a_bad_sampling_step_names_itself(storage: Storage, condition: dict[str, Any], message: str) -> None:
    unit = stage(storage, "0000-000000", [{"caption": "a cat"}])
    with pytest.raises(RecipeError, match=message):
        decide(validate(Recipe, {"dataset": "d", "select": [{"name": "x", **condition}]}), storage, [unit])


def by_hand(
    condition: dict[str, Any], left: list[int], groups: list[int], by: list[float], batch: list[int]
) -> set[int]:
    """Return the rows that a step keeps of those `left`."""
    kept, sizes = set[int](), {group: [groups[row] for row in left].count(group) for group in groups}
    for group in {groups[row] for row in left}:
        own = [row for row in left if groups[row] == group]
        if "top" in condition:
            own = [row for row in own if not math.isnan(by[row])]
            most = math.ceil(round(len(own) * condition["top"], 6))
            own.sort(key=lambda row: (-by[row], row))
        else:
            most = condition.get("at_most") or max(1, min(sizes[groups[row]] for row in left))
            if "by" in condition:
                own.sort(key=lambda row: (batch[row], math.isnan(by[row]), -by[row], row))
        kept |= set(own[:most])
    return kept


STEPS: list[dict[str, Any]] = [
    {"at_most": 2, "per": "url"},
    {"at_most": 3, "per": "url", "by": "width"},
    {"top": 0.4, "by": "width"},
    {"top": 0.3, "per": "url", "by": "width"},
    {"balance": "url"},
    {"balance": "url", "by": "width"},
]
row_values = st.tuples(
    st.sampled_from([0, 1, 1, 1, 1, 2**63, 2**64 - 1]),  # group
    st.sampled_from([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf, math.nan]),  # by
    st.sampled_from([PASSED, PASSED, PASSED, -1, 1, 3]),  # step
)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(row_values, max_size=150),
    first_batch=st.integers(0, 150),
    chosen=st.lists(st.sampled_from(STEPS), min_size=1, max_size=2),
    fit=st.sampled_from([4, 10, 1000]),
)
def test_outcomes_are_those_of_a_plain_loop_whatever_parts_rows_are_in(
    rows: list[tuple[int, float, int]], first_batch: int, chosen: list[dict[str, Any]], fit: int
) -> None:
    n, (groups, by, step) = len(rows), map(list, zip(*rows, strict=True)) if rows else ([], [], [])
    batch = [int(row >= first_batch) for row in range(n)]
    conditions = [Condition(name=f"step{number}", **given) for number, given in enumerate(chosen)]
    wanted = list(step)
    for number, condition in enumerate(chosen, 1):
        left = [row for row in range(n) if wanted[row] == PASSED or wanted[row] > number]
        of = groups if {"per", "balance"} & condition.keys() else [0] * n
        kept = by_hand(condition, left, of, by, batch)
        wanted = [number if row in left and row not in kept else wanted[row] for row in range(n)]
    numbers = range(1, len(chosen) + 1)
    nothing = np.zeros(n, np.int64)
    found = QueryResult(
        np.array(step, np.int16), nothing.astype("S16"), nothing.astype("S32"), nothing,
        nothing.astype(np.uint64), None,
        {k: np.array(groups, np.uint64) for k in numbers if {"per", "balance"} & chosen[k - 1].keys()},
        {k: np.array(by, np.float64) for k in numbers if "by" in chosen[k - 1]},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "PART_ROWS", fit)
        patch.setattr(large_arrays, "_PIECE", max(2, fit // 2))
        patch.setattr(large_arrays, "MAPPED_ROWS", 50)
        assert sample(conditions, found, np.array(batch, np.int64)).tolist() == wanted
