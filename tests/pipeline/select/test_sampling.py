"""Sampling steps: at_most, balance and top."""

from typing import Any

import pytest
from staged_rows import outcomes, recipe, scored, stage, survivors

from capstan.pipeline.config import Recipe, validate
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.select.decide import decide
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
