"""Packing: even shards in key order, the same bytes for the same decisions, and nothing half-replaced."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rows_recipe import Draw, build, published, rows_recipe, sound

from capstan.pipeline import build as stages
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration


@pytest.fixture
def make(tmp_path: Path, two_cpus: Resources, draw: Draw) -> Callable[..., Recipe]:
    """A recipe over a table of rows, see helpers/rows_recipe.py."""
    return functools.partial(rows_recipe, tmp_path, draw)


def test_where_nothing_is_kept_there_is_a_dataset_without_shards(
    make: Callable[..., Recipe], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make(20)
    build(recipe)
    none = make(20, least=10)
    summary = build(none)
    assert summary["counts"] == {"rows": 20, "kept": 0, "rejected": 18, "duplicate": 0, "failed": 2, "shards": 0}
    assert "no row is kept" in caplog.text
    assert "of 20 rows fetched and decoded dropped 2, score dropped 18" in caplog.text
    assert sound(none)
    names = published(none)
    assert not [name for name in names if name.startswith((".nv-meta/", "shards/shard"))]
    assert json.loads(names["sizes.json"]) == {}
    build(recipe)
    assert sound(recipe)
    assert ".nv-meta/.info.json" in published(recipe)


def test_shards_of_a_batch_differ_by_one_sample_at_most(make: Callable[..., Recipe]) -> None:
    keep_all = {"select": [], "dedup": {"exact": False, "perceptual": None}, "shards": {"samples": 7}}
    recipe = make(30, **keep_all)
    build(recipe)
    recipe = make(50, **keep_all)
    build(recipe)
    sizes = [entry.samples for entry in Dataset(Storage(recipe.dataset)).manifest.shards]
    assert sizes == [7, 7, 7, 6, 6, 6, 6]  # 27 images, then 18 more


def test_other_thresholds_repack_and_going_back_gives_the_same_bytes(make: Callable[..., Recipe]) -> None:
    strict, loose = make(60, least=4), make(60, least=0)
    build(loose)
    first = published(loose)
    seen = stages.select(strict, dry_run=True, progress=False)
    assert published(loose) == first
    changed = stages.select(strict, progress=False)
    assert changed["counts"] == seen["counts"]
    assert changed["counts"]["kept"] < 40
    assert sound(strict)
    build(loose)
    assert published(loose) == first


def test_new_rows_move_nothing_that_exists(make: Callable[..., Recipe]) -> None:
    build(make(40))
    before = published(make(40))
    recipe = make(60)
    build(recipe)
    after = published(recipe)
    assert sound(recipe)
    old = {name: data for name, data in before.items() if name.startswith(("shards/shard", "ledger/"))}
    assert old.items() <= after.items()
    assert len(Dataset(Storage(recipe.dataset)).ledger()) == 60


def test_unit_size_changes_nothing_in_the_shards(make: Callable[..., Recipe]) -> None:
    one, other = make(40), make(40, name="other", unit={"rows": 7})
    build(one)
    build(other)
    shards = [{n: d for n, d in published(r).items() if n.startswith("shards/")} for r in (one, other)]
    assert shards[0] == shards[1]


def test_no_index_is_there_while_shards_are_replaced(
    make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(make(40))
    dataset = Storage(make(40).dataset)
    assert dataset.exists(".nv-meta/.info.json")

    def cut_off(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("capstan.pipeline.pack.job.run", cut_off)
        with pytest.raises(KeyboardInterrupt):
            stages.select(make(40, least=4), progress=False)
    assert not dataset.names(".nv-meta")
    assert not dataset.exists("sizes.json")
    assert verify(dataset) == ["dataset.json: incomplete: run `capstan build` again"]
    stages.select(make(40, least=4), progress=False)
    assert verify(dataset) == []
