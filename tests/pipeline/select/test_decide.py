"""Order of the steps, duplicates and the assignment of shards, on rows made by hand."""

from staged_rows import key, outcomes, recipe, stage

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import sha256_of
from capstan.pipeline.select.decide import decide
from capstan.pipeline.storage import Storage


def test_conditions_apply_in_order_and_not_to_failed_rows(storage: Storage) -> None:
    unit = stage(storage, "0000-000000", [{}, {"width": 10}, {"width": 10, "height": 9}, {"reason": "timeout"}])
    conditions = [{"name": "wide", "where": "width >= 20"}, {"name": "high", "where": "height >= 20"}]
    decisions = decide(recipe(select=conditions), storage, [unit])
    assert [row[:2] for row in outcomes(decisions)] == [
        ("kept", ""),
        ("rejected", "wide"),
        ("rejected", "wide"),
        ("failed", None),
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


def test_no_rows_at_all(storage: Storage) -> None:
    decisions = decide(recipe(), storage, [stage(storage, "0000-000000", [{"reason": "empty"}])])
    assert decisions.counts["kept"] == 0


def test_a_recipe_that_was_dumped_is_the_same_when_it_is_read_again() -> None:
    steps = [
        {"name": "a", "where": "width > 1"},
        {"name": "b", "at_most": 2, "per": "domain"},
        {"name": "c", "balance": "x"},
    ]
    recipe = Recipe.model_validate({"dataset": "d", "select": steps})
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
