"""Conditions, duplicates and the allotment of shards, on measurements made by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from capstan.pipeline.config import Recipe, fingerprint, validate
from capstan.pipeline.dataset.shards import sha256_of
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.ingest.job import STAGED_SCHEMA, Staged
from capstan.pipeline.select.decide import Decisions, decide
from capstan.pipeline.storage import Storage


def stage(storage: Storage, unit: str, rows: list[dict[str, Any]]) -> Staged:
    """A staged unit with these measurements; whatever is not said is unremarkable and unlike all others."""
    full = []
    for number, row in enumerate(rows):
        plain = {
            name: "" if kind == pa.string() else 0
            for name, kind in zip(STAGED_SCHEMA.names, STAGED_SCHEMA.types, strict=True)
        }
        own = {"key": key(unit, number), "unit": unit, "width": 256, "height": 256, "extra": "{}"}
        own |= {"original_width": 500, "original_height": 500, "sha256": sha256_of(f"{unit}-{number}".encode())}
        own |= {"phash": int(fingerprint([unit, number]), 16)}
        full.append(plain | own | row)
    name = f"staged/{unit}.parquet"
    storage.write_table(name, pa.Table.from_pylist(full, schema=STAGED_SCHEMA))
    return Staged(unit, name, "some.tar", len(rows))


def key(unit: str, number: int) -> str:
    """Keys in the order in which they are staged."""
    return f"{fingerprint(unit)}{number:016x}"


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"dataset": "unused", **sections})


def outcomes(decisions: Decisions) -> list[tuple[str, str, str, str]]:
    nothing = pa.array([""] * len(decisions.step))
    columns = decisions.columns(0, len(decisions.step), nothing, nothing)
    return list(zip(*(column.to_pylist() for column in columns.values()), strict=True))


def test_conditions_apply_in_order_and_failed_rows_are_not_asked(storage: Storage) -> None:
    unit = stage(storage, "0000-000000", [{}, {"width": 10}, {"width": 10, "height": 9}, {"reason": "timeout"}])
    conditions = [{"name": "wide", "where": "width >= 20"}, {"name": "high", "where": "height >= 20"}]
    decisions = decide(recipe(select=conditions), storage, [unit])
    assert [row[:2] for row in outcomes(decisions)] == [
        ("kept", ""),
        ("rejected", "wide"),
        ("rejected", "wide"),
        ("failed", ""),
    ]
    assert [(step["step"], step["left"]) for step in decisions.funnel] == [
        ("rows", 4),
        ("fetched and decoded", 3),
        ("wide", 1),
        ("high", 1),
        ("exact duplicates", 1),
        ("near duplicates", 1),
    ]
    assert decisions.counts == {"rows": 4, "kept": 1, "rejected": 2, "duplicate": 0, "failed": 1, "shards": 1}


def test_a_condition_that_is_null_rejects(storage: Storage) -> None:
    unit = stage(storage, "0000-000000", [{"extra": '{"score": 0.9}'}, {"extra": '{"score": null}'}, {}])
    conditions = [{"name": "score", "where": "(extra->>'$.score')::float > 0.5"}]
    assert [row[0] for row in outcomes(decide(recipe(select=conditions), storage, [unit]))] == [
        "kept",
        "rejected",
        "rejected",
    ]


def test_duplicates_name_the_kept_key_and_only_compete_after_the_conditions(storage: Storage) -> None:
    same = {"sha256": sha256_of(b"same"), "phash": 7}
    rows = [same, same | {"original_width": 900, "width": 1}, {"phash": 7 ^ 0b101}]
    unit = stage(storage, "0000-000000", rows)
    all_in = outcomes(decide(recipe(), storage, [unit]))
    assert all_in[1][0] == "kept"
    assert all_in[0][:3] == ("duplicate", "exact", key("0000-000000", 1))
    assert all_in[2][:3] == ("duplicate", "perceptual", key("0000-000000", 1))
    conditions = [{"name": "wide", "where": "width > 5"}]
    assert [row[0] for row in outcomes(decide(recipe(select=conditions), storage, [unit]))] == [
        "kept",
        "rejected",
        "duplicate",
    ]


def test_shards_are_even_never_empty_and_do_not_mix_batches(storage: Storage) -> None:
    units = [stage(storage, "0000-000000", [{}] * 7), stage(storage, "0000-000001", [{}] * 4)]
    units += [stage(storage, "0001-000000", [{"reason": "empty"}] * 3), stage(storage, "0002-000000", [{}] * 2)]
    decisions = decide(recipe(shards={"samples": 4}, dedup={"perceptual": None}), storage, units)
    assert decisions.shard.tolist() == [0] * 4 + [1] * 4 + [2] * 3 + [-1] * 3 + [3] * 2


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("widht > 5", "select.x.where: no column 'widht'.*did you mean width"),
        ("width >", "select.x.where: Parser Error"),
        ("width", "select.x.where: gives integer, not yes or no"),
        ("no_such(width) > 1", "select.x.where: Catalog Error"),
        ("caption::int > 5", "select.x.where: Conversion Error"),
        ("(SELECT count(*) FROM read_csv('/etc/passwd')) > 0", "select.x.where: asks about other rows"),
        ("row_number() OVER () < 5", "select.x.where: asks about other rows.*at_most, balance and top"),
        ("avg(width) > 5", "select.x.where: Binder Error"),
        ("clip_scroe > 0.2", "select.x.where: no column 'clip_scroe'.*did you mean clip_score"),
    ],
)
def test_a_bad_condition_names_itself_and_the_mend(storage: Storage, where: str, message: str) -> None:
    unit = stage(storage, "0000-000000", [{"caption": "a cat"}])
    conditions = [{"name": "fine", "where": "width > 5"}, {"name": "x", "where": where}]
    with pytest.raises(RecipeError, match=message):
        decide(recipe(select=conditions, score={"clip": {}}), storage, [unit])


def test_no_rows_at_all(storage: Storage) -> None:
    decisions = decide(recipe(), storage, [stage(storage, "0000-000000", [{"reason": "empty"}])])
    assert decisions.counts["kept"] == 0


def test_a_domain_is_the_host_of_the_address(storage: Storage) -> None:
    urls = ["https://user:word@WWW.Example.org:8080/a?b@c", "http://example.org", "no address", "", "s3://bucket/key"]
    unit = stage(storage, "0000-000000", [{"url": url} for url in urls])
    for domain, expected in {"www.example.org": 0, "example.org": 1, "bucket": 4}.items():
        decisions = decide(recipe(select=[{"name": "x", "where": f"domain = '{domain}'"}]), storage, [unit])
        assert np.nonzero(decisions.step == 0)[0].tolist() == [expected]


def scored(storage: Storage, unit: Staged, scores: list[float | None]) -> Staged:
    """The unit with a clip_score for every row."""
    name = f"scores/x/{unit.unit}.parquet"
    storage.write_table(name, pa.table({"clip_score": pa.array(scores, pa.float32()), "error": [""] * len(scores)}))
    return replace(unit, scores=(("clip", name),))


def survivors(storage: Storage, units: list[Staged], *conditions: dict[str, Any]) -> list[int]:
    """Rows that meet all conditions; the recipe has clip scores."""
    decisions = decide(recipe(select=list(conditions), score={"clip": {}}), storage, units)
    return np.nonzero(decisions.step == 0)[0].tolist()


def test_scores_are_columns_and_null_rejects(storage: Storage) -> None:
    unit = scored(storage, stage(storage, "0000-000000", [{}] * 4), [0.1, 0.3, None, 0.4])
    assert survivors(storage, [unit], {"name": "match", "where": "clip_score >= 0.28"}) == [1, 3]
    assert survivors(storage, [unit], {"name": "said", "where": "score_error = ''"}) == [0, 1, 2, 3]
    unscored = stage(storage, "0000-000001", [{}] * 2)
    assert survivors(storage, [unit, unscored], {"name": "match", "where": "clip_score >= 0.28"}) == [1, 3]


def test_at_most_so_many_of_a_domain(storage: Storage) -> None:
    hosts = ["a", "b", "a", "a", "c", "b", "a"]
    unit = stage(storage, "0000-000000", [{"url": f"http://{host}/{n}"} for n, host in enumerate(hosts)])
    unit = scored(storage, unit, [0.1, 0.2, None, 0.9, 0.5, 0.2, 0.3])
    few = {"name": "few", "at_most": 2, "per": "domain"}
    assert survivors(storage, [unit], few) == [0, 1, 2, 4, 5]
    assert survivors(storage, [unit], few | {"by": "clip_score"}) == [1, 3, 4, 5, 6]
    assert survivors(storage, [unit], few | {"at_most": 3, "by": "clip_score"}) == [0, 1, 3, 4, 5, 6]
    assert survivors(storage, [unit], few | {"at_most": 4, "by": "clip_score"}) == list(range(7))
    # New rows unseat none of an earlier batch.
    new = scored(storage, stage(storage, "0001-000000", [{"url": "http://a/9"}, {"url": "http://c/9"}]), [0.99, 0.1])
    assert survivors(storage, [unit, new], few | {"by": "clip_score"}) == [1, 3, 4, 5, 6, 8]


def test_steps_go_by_what_those_before_them_left(storage: Storage) -> None:
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


def test_the_best_part_is_rounded_up_and_ties_go_by_key(storage: Storage) -> None:
    unit = scored(storage, stage(storage, "0000-000000", [{}] * 7), [0.5, None, 0.5, 0.5, 0.9, 0.5, 0.5])
    assert survivors(storage, [unit], {"name": "best", "top": 0.5, "by": "clip_score"}) == [0, 2, 4]
    assert survivors(storage, [unit], {"name": "best", "top": 1, "by": "clip_score"}) == [0, 2, 3, 4, 5, 6]
    thirty = stage(storage, "0001-000000", [{"width": n} for n in range(30)])
    assert survivors(storage, [thirty], {"name": "best", "top": 0.1, "by": "width"}) == [27, 28, 29]
    halves = {"name": "best", "top": 0.5, "per": "width % 3", "by": "width"}
    assert survivors(storage, [thirty], halves) == list(range(15, 30))


def test_values_in_balance(storage: Storage) -> None:
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
        ({"where": "true", "by": "width"}, "x has where, which takes no by"),
        ({"where": "true", "top": 0.5}, "found: where, top"),
        ({}, "found: none"),
        ({"at_most": 3, "per": "domian"}, "select.x.per: no column 'domian'.*did you mean domain"),
        ({"top": 0.5, "by": "caption"}, "select.x.by: Conversion Error"),
        ({"balance": "width +"}, "select.x.balance: Parser Error"),
    ],
)
def test_a_bad_sampling_step_names_itself(storage: Storage, condition: dict[str, Any], message: str) -> None:
    unit = stage(storage, "0000-000000", [{"caption": "a cat"}])
    with pytest.raises(RecipeError, match=message):
        decide(validate(Recipe, {"dataset": "d", "select": [{"name": "x", **condition}]}), storage, [unit])


def test_many_units_are_asked_in_blocks_in_their_order(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [stage(storage, f"0000-{n:06}", [{"width": n}, {"width": 100 + n}]) for n in range(9)]
    whole = decide(recipe(select=[{"name": "w", "where": "width % 3 > 0"}]), storage, units)
    monkeypatch.setattr("capstan.pipeline.select.conditions._BLOCK_ROWS", 5)
    parts = decide(recipe(select=[{"name": "w", "where": "width % 3 > 0"}]), storage, units)
    assert parts.step.tolist() == whole.step.tolist()
    assert parts.step.tolist() == [int(w % 3 == 0) for n in range(9) for w in (n, 100 + n)]
    assert (parts.key == whole.key).all()


def test_a_recipe_that_was_dumped_is_the_same_when_it_is_read_again() -> None:
    steps = [
        {"name": "a", "where": "width > 1"},
        {"name": "b", "at_most": 2, "per": "domain"},
        {"name": "c", "balance": "x"},
    ]
    recipe = Recipe.model_validate({"dataset": "d", "select": steps})
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
