"""SQL conditions: evaluation, errors, derived columns, blocks."""

import numpy as np
import pytest
from staged_rows import outcomes, recipe, scored, stage, survivors

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.select.decide import decide
from capstan.pipeline.storage import Storage


def test_a_condition_that_is_null_rejects(storage: Storage) -> None:
    unit = stage(storage, "0000-000000", [{"extra": '{"score": 0.9}'}, {"extra": '{"score": null}'}, {}])
    conditions = [{"name": "score", "where": "(extra->>'$.score')::float > 0.5"}]
    assert [row[0] for row in outcomes(decide(recipe(select=conditions), storage, [unit]))] == [
        "kept",
        "rejected",
        "rejected",
    ]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("widht > 5", "select.x.where: no column 'widht'.*did you mean width"),
        ("width >", "select.x.where: the SQL ends too early"),
        ("width", "select.x.where: returns integer, not true or false"),
        ("no_such(width) > 1", "select.x.where: no function 'no_such'"),
        ("caption::int > 5", "select.x.where: Conversion Error"),
        ("(SELECT count(*) FROM read_csv('/etc/passwd')) > 0", "select.x.where: refers to other rows"),
        ("row_number() OVER () < 5", "select.x.where: refers to other rows.*at_most, balance and top"),
        ("avg(width) > 5", "select.x.where: refers to other rows"),
        ("lenght(caption) > 5", "select.x.where: no function 'lenght'.*did you mean length"),
        ("image_sharpnes > 5", "select.x.where: no column 'image_sharpnes'.*add score.image, which measures"),
        ("clip_scroe > 0.2", "select.x.where: no column 'clip_scroe'.*did you mean clip_score"),
    ],
)
def test_a_bad_condition_is_named_with_a_fix(storage: Storage, where: str, message: str) -> None:
    unit = stage(storage, "0000-000000", [{"caption": "a cat"}])
    conditions = [{"name": "fine", "where": "width > 5"}, {"name": "x", "where": where}]
    with pytest.raises(RecipeError, match=message):
        decide(recipe(select=conditions, score={"clip": {}}), storage, [unit])


def test_domain_is_the_host_of_the_url(storage: Storage) -> None:
    urls = ["https://user:word@WWW.Example.org:8080/a?b@c", "http://example.org", "not a url", "", "s3://bucket/key"]
    unit = stage(storage, "0000-000000", [{"url": url} for url in urls])
    for domain, expected in {"www.example.org": 0, "example.org": 1, "bucket": 4}.items():
        decisions = decide(recipe(select=[{"name": "x", "where": f"domain = '{domain}'"}]), storage, [unit])
        assert np.nonzero(decisions.step == 0)[0].tolist() == [expected]


def test_scores_are_columns_and_null_rejects(storage: Storage) -> None:
    unit = scored(storage, stage(storage, "0000-000000", [{}] * 4), [0.1, 0.3, None, 0.4])
    assert survivors(storage, [unit], {"name": "match", "where": "clip_score >= 0.28"}) == [1, 3]
    assert survivors(storage, [unit], {"name": "said", "where": "score_error = ''"}) == [0, 1, 2, 3]
    unscored = stage(storage, "0000-000001", [{}] * 2)
    assert survivors(storage, [unit, unscored], {"name": "match", "where": "clip_score >= 0.28"}) == [1, 3]


def test_units_are_evaluated_in_blocks_in_order(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [stage(storage, f"0000-{n:06}", [{"width": n}, {"width": 100 + n}]) for n in range(9)]
    whole = decide(recipe(select=[{"name": "w", "where": "width % 3 > 0"}]), storage, units)
    monkeypatch.setattr("capstan.pipeline.select.evaluate._BLOCK_ROWS", 5)
    parts = decide(recipe(select=[{"name": "w", "where": "width % 3 > 0"}]), storage, units)
    assert parts.step.tolist() == whole.step.tolist()
    assert parts.step.tolist() == [int(w % 3 == 0) for n in range(9) for w in (n, 100 + n)]
    assert (parts.key == whole.key).all()
