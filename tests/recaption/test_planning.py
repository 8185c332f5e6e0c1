"""What a layer still needs is found without reading what it has: new data costs only itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pytest
from caption_runs import STEPS, Build, layer_files, recipe, tree
from small_dataset import image

from capstan.pipeline.dataset.shards import read_manifest, sha256_of, write_manifest
from capstan.pipeline.records import make_key
from capstan.pipeline.select.pairs import changed, read_pairs, write_pairs
from capstan.pipeline.storage import Storage
from capstan.recaption import store
from capstan.recaption.job import plan, recaption
from capstan.recaption.planning import existing


def test_new_data_costs_only_itself(build: Build, captioner: Path, captioned: Counter[str]) -> None:
    storage = build(STEPS)
    recaption(recipe(captioner, storage))
    before = layer_files(storage)
    captioned.clear()
    build([*STEPS, [8, 9, 3]])  # a new shard, with one image that is captioned already
    everything = tree(storage)
    planned = plan(recipe(captioner, storage))
    assert tree(storage) == everything
    assert {name: planned[name] for name in ("done", "new", "reused", "stale")} == {
        "done": 8,
        "new": 2,
        "reused": 1,
        "stale": 0,
    }
    assert planned["captions"] == 4
    assert planned["sample"]["pictures"] == 2
    assert planned["sample"]["seconds"] > 0
    assert planned["tokens"] == planned["sample"]["tokens"] > 0  # both new images are in the sample
    assert planned["eta_s"] == pytest.approx(planned["sample"]["seconds"], abs=2e-3)
    captioned.clear()
    summary = recaption(recipe(captioner, storage))
    assert (summary["new"], summary["reused"], summary["done"]) == (2, 1, 8)
    assert sum(captioned.values()) == 2
    after = layer_files(storage)
    assert {name: after[name] for name in before} == before


def test_many_shards_are_looked_up_in_pieces(
    build: Build, captioner: Path, captioned: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges of few rows and files of one shard; some images are in two shards, and some were captioned before."""
    before, after = [[0, 1, 2], [3, 4], [5, 6, 7]], [[7, 1, 9], [9, 0, 8], [2, 8, 3], [9, 10, 4]]
    storage, other = build(before), build(before, "other")
    for one in (storage, other):
        recaption(recipe(captioner, one))
        build(after, Path(one.url).name)
    captioned.clear()
    whole, expected = plan(recipe(captioner, other)), recaption(recipe(captioner, other))
    assert (whole["new"], whole["captions"], expected["new"]) == (3, 6, 3)
    for name, size in (("_RANGE_ROWS", 3), ("_DEALT", 1), ("_SCANNED", 1)):
        monkeypatch.setattr(existing, name, size)
    counted = ("new", "captions", "reused", "done")
    pieces = plan(recipe(captioner, storage))
    assert [pieces[name] for name in counted] == [whole[name] for name in counted]
    captioned.clear()
    summary = recaption(recipe(captioner, storage))
    assert [summary[name] for name in counted] == [expected[name] for name in counted]
    assert set(captioned.values()) == {1}
    assert layer_files(storage) == layer_files(other)
    assert not [name for name in storage.names("state") if "recaption-plan" in name]


def selected(storage: Storage, exact: bool) -> None:
    """Let the manifest say how exact repeats were selected."""
    manifest = read_manifest(storage)
    assert manifest is not None
    write_manifest(storage, manifest.model_copy(update={"recipe": {"dedup": {"exact": exact}}}))


def test_nothing_is_looked_up_where_no_caption_can_be(
    build: Build, captioner: Path, captioned: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new layer, more data, and a shard with images that failed; but after shards were repacked."""
    storage = build(STEPS)
    selected(storage, exact=True)
    with monkeypatch.context() as patched:
        patched.setattr(existing.Lookup, "find", lambda *_, **__: pytest.fail("images were looked up"))
        assert plan(recipe(captioner, storage))["new"] == 8
        layer = recaption(recipe(captioner, storage))["layer"]
        build([*STEPS, [8, -9]])
        selected(storage, exact=True)
        assert plan(recipe(captioner, storage))["new"] == 2
        assert recaption(recipe(captioner, storage))["new"] == 1
        captioned.clear()
        planned = plan(recipe(captioner, storage))
        assert (planned["new"], planned["captions"], planned["reused"], planned["done"]) == (1, 2, 1, 8)
        summary = recaption(recipe(captioner, storage))
        assert (summary["new"], summary["reused"], summary["unreadable"]) == (0, 1, 1)
        assert not captioned
    build([STEPS[0], STEPS[1][:2], [*STEPS[2], STEPS[1][2]]])
    selected(storage, exact=True)
    summary = recaption(recipe(captioner, storage))
    assert (summary["layer"], summary["new"], summary["reused"], summary["done"]) == (layer, 0, 4, 4)
    assert not captioned
    # Two rows of one file, which a person found to be different, are both in the dataset.
    build([*STEPS, [20], [20, 21]])
    selected(storage, exact=True)
    one, other = sorted([make_key("20"), make_key("21")])
    write_pairs(storage, changed(read_pairs(storage), {(one, other): "different"}, "me"))
    assert recaption(recipe(captioner, storage))["new"] == 2
    assert set(captioned.values()) == {1}


def test_ten_percent_more_data_costs_ten_percent(build: Build, captioner: Path, captioned: Counter[str]) -> None:
    """Images that the engine is given: a tenth more in a shard of its own; then shards that stay, that are renamed,
    that are new, and one repacked.
    """
    old = [list(range(start, start + 10)) for start in range(0, 40, 10)]
    storage = build(old)
    layer = recaption(recipe(captioner, storage))["layer"]
    assert sum(captioned.values()) == 40
    before = tree(storage)
    build([*old, list(range(50, 54))])
    captioned.clear()
    summary = recaption(recipe(captioner, storage))
    assert captioned == dict.fromkeys([sha256_of(image(number)) for number in range(50, 54)], 1)
    assert (summary["new"], summary["reused"], summary["done"], summary["layer"]) == (4, 0, 40, layer)
    after, of_layer = tree(storage), [name for name in before if name.startswith("captions/")]
    assert [after[name] for name in of_layer] == [
        before[name] for name in of_layer
    ]  # bytes, and when they were written
    build([old[0], old[1], [40, 41, *old[3][:8]], old[2], [*old[3][8:], 42, 43]])
    planned = plan(recipe(captioner, storage))
    assert (planned["new"], planned["reused"], planned["done"]) == (4, 20, 20)
    captioned.clear()
    summary = recaption(recipe(captioner, storage))
    assert captioned == dict.fromkeys([sha256_of(image(number)) for number in range(40, 44)], 1)
    assert (summary["new"], summary["reused"], summary["done"], summary["layer"]) == (4, 20, 20, layer)
    after = tree(storage)
    for shard in ("shard-000000", "shard-000001"):
        name = store.file_name(layer, shard)
        assert after[name] == before[name]  # not even touched


def test_a_takedown_costs_nothing(build: Build, captioner: Path, captioned: Counter[str]) -> None:
    """A shard without one of its samples, and its captions without that sample's rows."""
    storage = build(STEPS)
    layer = recaption(recipe(captioner, storage))["layer"]
    build([[0, 1, 3], STEPS[1], STEPS[2]])
    name = store.file_name(layer, "shard-000000")
    table = storage.read_table(name)
    storage.write_table(name, table.filter(pc.not_equal(table["key"], make_key("2"))))
    captioned.clear()
    assert (plan(recipe(captioner, storage))["new"], sum(captioned.values())) == (0, 0)
    assert recaption(recipe(captioner, storage))["new"] == 0
    assert not captioned
    assert make_key("2") not in store.read_rows(storage, layer, "shard-000000")["key"].to_pylist()
