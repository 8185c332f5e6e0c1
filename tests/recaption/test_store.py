"""Layers: written once, read by key and slot, listed when published."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_dataset import as_if_a_model_wrote_it, image, replace_image, write_dataset

from capstan.pipeline.dataset.shards import sha256_of
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.records import make_key
from capstan.pipeline.storage import Storage
from capstan.recaption import store
from capstan.recaption.lint import linter
from capstan.recaption.lint.linter import Settings
from capstan.recaption.store import Place, Row

Texts = dict[str, dict[str, str]]
KEY = [make_key(str(number)) for number in range(5)]
SHA256 = [sha256_of(image(number)) for number in range(5)]


def row(raw: str, tokens: int, finish: linter.Finish, seed: int) -> Row:
    return Row.of_caption(raw, tokens, finish, seed, linter.lint(raw, finish, parted=True))


def test_rows_come_back_as_they_were_written(build: Callable[..., Storage]) -> None:
    storage, name = build([[0, 1], [2]]), store.file_name("layer", "shard-000000")
    rows = [
        (Place(KEY[0], SHA256[0], "", "short"), row("a dog .", 3, "end", 17)),
        (Place(KEY[0], SHA256[0], "", "descriptive"), row("a brown dog . on", 5, "length", 18)),
        (Place(KEY[1], SHA256[1], "", "short"), Row.missing(linter.UNREADABLE)),
        (
            Place(KEY[1], SHA256[1], "", "descriptive"),
            row("b b b b", 4, "end", 19).as_original().with_original("alt 1"),
        ),
    ]
    store.write_rows(storage, name, rows)
    table = store.read_rows(storage, "layer", "shard-000000")
    assert table.schema == store.SCHEMA
    assert table.to_pylist()[1] == {
        "key": KEY[0],
        "sha256": SHA256[0],
        "slot": "descriptive",
        "quoted": "",
        "raw": "a brown dog . on",
        "text": "a brown dog.",
        "tokens": 5,
        "finish": "length",
        "seed": 18,
        "flags": ["no_end"],
        "discarded": [],
    }
    stands_in = table.to_pylist()[3]
    assert (stands_in["raw"], stands_in["text"], stands_in["flags"]) == ("b b b b", "alt 1", ["loop", "original"])
    assert store.read_layer(storage, "layer", "shard-000000") == {
        KEY[0]: {"short": "a dog.", "descriptive": "a brown dog."}
    }
    with pytest.raises(FileNotFoundError):
        store.read_layer(storage, "layer", "shard-000001")
    first = storage.read(name)
    store.write_rows(storage, name, rows)
    assert storage.read(name) == first


def test_layers_are_listed_in_the_order_of_publication(build: Callable[..., Storage]) -> None:
    storage = build([[0]])
    assert store.list_layers(storage) == []
    assert store.latest_layer(storage) is None
    store.publish(storage, "zebra", ["short"], {"engine": "x"}, Settings())
    store.publish(storage, "ant", ["short"], {"engine": "y"}, Settings())
    store.write_rows(storage, store.file_name("unfinished", "shard-000000"), [])
    assert store.list_layers(storage) == ["zebra", "ant"]
    recipe = storage.read("captions/zebra/recipe.json")
    store.publish(storage, "zebra", ["short"], {"engine": "x"}, Settings())
    assert storage.read("captions/zebra/recipe.json") == recipe
    assert store.latest_layer(storage) == "ant"
    assert store.layer_recipe(storage, "ant")["engine"] == {"engine": "y"}
    with pytest.raises(RecipeError, match="zebra, ant"):
        store.layer_recipe(storage, "unfinished")


def test_given_captions_are_a_layer_like_any_other(build: Callable[..., Storage]) -> None:
    storage = build([[0, 1], [2]])
    captions = {
        KEY[2]: {"short": "two dogs"},
        KEY[0]: {"short": "a cat", "descriptive": "a cat on a mat."},
        KEY[4]: {"short": "elsewhere"},
    }
    assert store.write_given_layer(storage, "given", captions) == {"images": 2, "missing": 1}
    assert store.latest_layer(storage) == "given"
    assert store.layer_recipe(storage, "given")["slots"] == ["descriptive", "short"]
    assert store.read_layer(storage, "given", "shard-000000") == {KEY[0]: captions[KEY[0]]}
    assert store.read_layer(storage, "given", "shard-000001") == {KEY[2]: captions[KEY[2]]}
    rows = store.read_rows(storage, "given", "shard-000000").to_pylist()
    assert {row["finish"] for row in rows} == {"given"}
    assert len(rows[0]["sha256"]) == 64
    with pytest.raises(RecipeError, match="not a valid layer name"):
        store.write_given_layer(storage, "../up", captions)


def test_what_people_wrote_is_flagged_and_kept(build: Callable[..., Storage]) -> None:
    storage = build([[0]])
    store.write_given_layer(storage, "given", {KEY[0]: {"short": "a dog ,"}})
    (only,) = store.read_rows(storage, "given", "shard-000000").to_pylist()
    assert (only["text"], only["flags"]) == ("a dog ,", ["unfinished"])
    assert store.read_layer(storage, "given", "shard-000000") == {KEY[0]: {"short": "a dog ,"}}


def test_a_table_without_some_of_its_rows_is_still_a_layers_table(build: Callable[..., Storage]) -> None:
    """What a takedown does, which knows nothing of layers but the column `key`."""
    storage, name = build([[0, 1]]), store.file_name("given", "shard-000000")
    store.write_given_layer(storage, "given", {key: {"short": f"dog {key}"} for key in KEY[:2]})
    table = storage.read_table(name)
    storage.write_table(name, table.filter(pc.not_equal(table["key"], KEY[0])))
    assert store.read_layer(storage, "given", "shard-000000") == {KEY[1]: {"short": f"dog {KEY[1]}"}}
    again = build([[1]], "again")
    store.write_given_layer(again, "given", {KEY[1]: {"short": f"dog {KEY[1]}"}})
    assert storage.read_table(name) == again.read_table(name)


def test_what_people_wrote_follows_its_images_wherever_they_are_packed(build: Callable[..., Storage]) -> None:
    storage = build([[0, 1], [2, 3]])
    captions = {key: {"short": f"dog {key}", "descriptive": f"a dog, {key}."} for key in KEY[:4]}
    store.write_given_layer(storage, "given", captions)
    before = {name: storage.read(name) for name in storage.names(store.ROOT)}
    build([[0, 2], [4], [1, 3]])  # repacked with one new image
    assert store.read_layer(storage, "given", "shard-000000") == {key: captions[key] for key in (KEY[0], KEY[2])}
    assert store.read_layer(storage, "given", "shard-000001") == {}
    assert store.read_layer(storage, "given", "shard-000002") == {key: captions[key] for key in (KEY[1], KEY[3])}
    assert {name: storage.read(name) for name in storage.names(store.ROOT)} == before
    build([[0, 1, 2, 3]])
    assert store.read_layer(storage, "given", "shard-000000") == captions
    store.write_given_layer(storage, "given", {KEY[3]: {"short": "corrected", "descriptive": "corrected."}})
    assert store.read_layer(storage, "given", "shard-000000").keys() == {KEY[3]}  # what was there is gone everywhere


def test_a_caption_is_of_one_image(build: Callable[..., Storage]) -> None:
    """A key whose address serves another image now has no caption; its neighbours keep theirs."""
    storage = build([[0, 1], [2]])
    store.write_given_layer(storage, "given", {key: {"short": f"dog {key}"} for key in KEY[:3]})
    replace_image(storage, "shard-000000", KEY[1])
    assert store.read_layer(storage, "given", "shard-000000") == {KEY[0]: {"short": f"dog {KEY[0]}"}}
    images = storage.read_table("shards/shard-000000.parquet", ["key", "sha256"])
    store.check_layer(storage, "given", "shard-000000", images)  # people may leave samples out
    as_if_a_model_wrote_it(storage, "given")
    with pytest.raises(RecipeError, match="shard-000000 in layer given belong to an earlier version"):
        store.check_layer(storage, "given", "shard-000000", images)
    others = storage.read_table("shards/shard-000001.parquet", ["key", "sha256"])
    store.check_layer(storage, "given", "shard-000001", others)


def test_slots_without_any_caption_are_found(build: Callable[..., Storage]) -> None:
    storage = build([[0, 1], [2]])
    texts = {KEY[0]: {"short": "a dog", "descriptive": "a brown dog."}}
    store.write_given_layer(storage, "mine", texts)
    assert store.empty_slots(storage, "mine", ["short", "descriptive", "original", "fused"]) == ["fused"]
    assert store.empty_slots(storage, "mine", ["short", "original"]) == []


def test_layer_id_changes_with_the_engine_the_cleaning_and_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.layer_id({"weights": "a"}, Settings())
    assert first == store.layer_id({"weights": "a"}, Settings())
    assert first != store.layer_id({"weights": "b"}, Settings())
    assert first != store.layer_id({"weights": "a"}, Settings(retries=1))
    monkeypatch.setattr(store.linter, "VERSION", 99)
    store.linter.identity.cache_clear()
    assert first != store.layer_id({"weights": "a"}, Settings())
    store.linter.identity.cache_clear()


def test_a_layer_over_a_models_layer_resolves_by_image_and_slot(build: Callable[..., Storage]) -> None:
    storage = build([[0, 1], [2]])
    texts = {key: {"short": f"dog {key}", "descriptive": f"a dog, {key}."} for key in KEY[:3]}
    store.write_given_layer(storage, "model", texts)
    as_if_a_model_wrote_it(storage, "model")
    store.write_given_layer(storage, "mine", {KEY[0]: {"short": "a cat"}, KEY[2]: {"tags": "cat, sofa"}}, over="model")
    assert store.layer_recipe(storage, "mine")["slots"] == ["descriptive", "short", "tags"]
    assert store.read_layer(storage, "mine", "shard-000000") == {
        KEY[0]: {"short": "a cat", "descriptive": f"a dog, {KEY[0]}."},
        KEY[1]: texts[KEY[1]],
    }
    assert store.read_layer(storage, "mine", "shard-000001") == {KEY[2]: {**texts[KEY[2]], "tags": "cat, sofa"}}
    assert store.read_layer(storage, "model", "shard-000000") == {key: texts[key] for key in KEY[:2]}
    assert store.empty_slots(storage, "mine", ["descriptive", "tags", "fused"]) == ["fused"]
    assert [store.model_layer(storage, layer) for layer in ("mine", "model")] == ["model", "model"]
    replace_image(storage, "shard-000000", KEY[0])  # the correction was of another image
    assert store.read_layer(storage, "mine", "shard-000000") == {KEY[1]: texts[KEY[1]]}


def test_a_layer_over_an_incomplete_one_is_incomplete(build: Callable[..., Storage]) -> None:
    storage = build([[0], [1]])
    store.write_given_layer(storage, "model", {key: {"short": "a dog"} for key in KEY[:2]})
    as_if_a_model_wrote_it(storage, "model")
    store.write_given_layer(storage, "mine", {KEY[1]: {"short": "a cat"}}, over="model")
    images = storage.read_table("shards/shard-000001.parquet", ["key", "sha256"])
    store.check_layer(storage, "mine", "shard-000001", images)
    storage.delete(store.file_name("model", "shard-000001"))
    assert [store.is_captioned(storage, "mine", shard) for shard in ("shard-000000", "shard-000001")] == [True, False]
    with pytest.raises(RecipeError, match="layer model has no captions for shard-000001"):
        store.check_layer(storage, "mine", "shard-000001", images)
    with pytest.raises(RecipeError, match=r"layer mine lies over layer model itself\. Fix: use model"):
        store.write_given_layer(storage, "third", {KEY[0]: {"short": "a cow"}}, over="mine")
    storage.delete(*storage.names("captions/model"))
    with pytest.raises(RecipeError, match="no caption layer 'model'"):
        store.read_layer(storage, "mine", "shard-000000")


TEXTS_OF = st.dictionaries(st.sampled_from(KEY), st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from("xyz")))


@settings(max_examples=5, deadline=None)
@given(below=TEXTS_OF, above=TEXTS_OF, packed=st.permutations(range(5)), cut=st.integers(1, 4))
def test_each_image_and_slot_has_the_upper_text_else_the_lower(
    tmp_path_factory: pytest.TempPathFactory, below: Texts, above: Texts, packed: list[int], cut: int
) -> None:
    """Whatever people wrote, and wherever the images are packed afterwards."""
    storage = Storage(str(tmp_path_factory.mktemp("ds")))
    write_dataset(storage, [[0, 1, 2], [3, 4]])
    store.write_given_layer(storage, "lower", below)
    store.write_given_layer(storage, "upper", above, over="lower")
    write_dataset(storage, [sorted(packed[:cut]), sorted(packed[cut:])])
    found: Texts = {}
    for shard in ("shard-000000", "shard-000001"):
        found |= store.read_layer(storage, "upper", shard)
    assert found == {key: both for key in KEY if (both := {**below.get(key, {}), **above.get(key, {})})}
