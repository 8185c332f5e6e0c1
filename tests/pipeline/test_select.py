"""Conditions, duplicates and the allotment of shards, on measurements made by hand."""

from typing import Any

import pyarrow as pa
import pytest

from pipeline.config import Recipe, fingerprint
from pipeline.errors import RecipeError
from pipeline.ingest import STAGED_SCHEMA, Staged
from pipeline.select import Decisions, decide
from pipeline.storage import Storage


def stage(storage: Storage, unit: str, rows: list[dict[str, Any]]) -> Staged:
    """A staged unit with these measurements; whatever is not said is unremarkable and unlike all others."""
    full = []
    for number, row in enumerate(rows):
        plain = {
            name: "" if kind == pa.string() else 0
            for name, kind in zip(STAGED_SCHEMA.names, STAGED_SCHEMA.types, strict=True)
        }
        own = {"key": f"{unit}-{number:03}", "unit": unit, "width": 256, "height": 256, "extra": "{}"}
        own |= {"original_width": 500, "original_height": 500, "sha256": f"{unit}-{number}"}
        own |= {"phash": int(fingerprint([unit, number]), 16)}
        full.append(plain | own | row)
    name = f"staged/{unit}.parquet"
    storage.write_table(name, pa.Table.from_pylist(full, schema=STAGED_SCHEMA))
    return Staged(unit, name, "some.tar", len(rows))


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"dataset": "unused", **sections})


def outcomes(decisions: Decisions) -> list[tuple[str, str, str, str]]:
    nothing = pa.array([""] * len(decisions.step))
    columns = decisions.columns(0, len(decisions.step), nothing, nothing)
    return list(zip(*columns.values(), strict=True))


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
    same = {"sha256": "same", "phash": 7}
    rows = [same, same | {"original_width": 900, "width": 1}, {"phash": 7 ^ 0b101}]
    unit = stage(storage, "0000-000000", rows)
    all_in = outcomes(decide(recipe(), storage, [unit]))
    assert all_in[1][0] == "kept"
    assert all_in[0][:3] == ("duplicate", "exact", "0000-000000-001")
    assert all_in[2][:3] == ("duplicate", "perceptual", "0000-000000-001")
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
        ("(SELECT count(*) FROM read_csv('/etc/passwd')) > 0", "select.x.where: Permission Error"),
    ],
)
def test_a_bad_condition_names_itself_and_the_mend(storage: Storage, where: str, message: str) -> None:
    unit = stage(storage, "0000-000000", [{"caption": "a cat"}])
    conditions = [{"name": "fine", "where": "width > 5"}, {"name": "x", "where": where}]
    with pytest.raises(RecipeError, match=message):
        decide(recipe(select=conditions), storage, [unit])


def test_no_rows_at_all(storage: Storage) -> None:
    decisions = decide(recipe(), storage, [stage(storage, "0000-000000", [{"reason": "empty"}])])
    assert decisions.counts["kept"] == 0
