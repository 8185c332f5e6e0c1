"""Captions corrected one by one: a layer over the layer they correct, which can be taken back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from small_dataset import as_if_a_model_wrote_it, image

from capstan.pipeline.dataset.shards import sha256_of
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.records import make_key
from capstan.pipeline.storage import Storage
from capstan.recaption import edits, store
from capstan.recaption.store import Place

KEY = [make_key(str(number)) for number in range(3)]


@pytest.fixture
def storage(build: Callable[..., Storage]) -> Storage:
    """Three images whose captions a model wrote."""
    storage = build([[0, 1], [2]])
    store.write_given_layer(storage, "model", {key: {"short": "a dog", "descriptive": "a brown dog."} for key in KEY})
    as_if_a_model_wrote_it(storage, "model")
    return storage


def edit(storage: Storage, number: int, text: str | None, slot: str = "short", layer: str = "model") -> None:
    place = Place(KEY[number], sha256_of(image(number)), "", slot)
    edits.write_edits(storage, layer, edits.changed(edits.read_edits(storage, layer), place, text))


def test_an_edit_is_a_layer_over_the_models(storage: Storage) -> None:
    edit(storage, 2, "a cat")
    edit(storage, 0, "a cow ,")
    edit(storage, 0, "a cow")
    assert store.list_layers(storage) == ["model", "model-edited"]
    assert store.latest_layer(storage) == "model-edited"
    assert store.read_layer(storage, "model-edited", "shard-000000") == {
        KEY[0]: {"short": "a cow", "descriptive": "a brown dog."},
        KEY[1]: {"short": "a dog", "descriptive": "a brown dog."},
    }
    assert store.read_layer(storage, "model-edited", "shard-000001")[KEY[2]]["short"] == "a cat"
    table = edits.read_edits(storage, "model")
    assert table["key"].to_pylist() == sorted([KEY[0], KEY[2]])
    assert [edits.text_of(table, KEY[0], slot) for slot in ("short", "descriptive")] == ["a cow", None]


def test_an_edit_is_taken_back(storage: Storage) -> None:
    edit(storage, 0, "a cow")
    edit(storage, 0, None)
    assert edits.read_edits(storage, "model").num_rows == 0
    assert store.read_layer(storage, "model-edited", "shard-000000")[KEY[0]]["short"] == "a dog"


def test_edits_follow_their_image(storage: Storage, build: Callable[..., Storage]) -> None:
    store.write_given_layer(storage, "people", {key: {"short": "a dog"} for key in KEY})
    edit(storage, 0, "a cow", layer="people")
    build([[1], [0, 2]])
    assert store.read_layer(storage, "people-edited", "shard-000001")[KEY[0]] == {"short": "a cow"}


def test_an_edit_is_flagged_and_kept_as_it_was_written(storage: Storage) -> None:
    edit(storage, 0, " the image shows a cow \u202e ")
    (row,) = edits.read_edits(storage, "model").to_pylist()
    assert (row["text"], row["finish"]) == (" the image shows a cow \u202e ", "given")
    assert "opener" in row["flags"]


def test_what_cannot_be_edited(storage: Storage) -> None:
    edit(storage, 0, "a cow")
    for text, problem in ((" ", "is empty"), ("x" * 10_001, "10,001 characters")):
        with pytest.raises(RecipeError, match=problem):
            edit(storage, 0, text)
    with pytest.raises(RecipeError, match="lies over layer model itself"):
        edit(storage, 0, "a cat", layer="model-edited")
    with pytest.raises(RecipeError, match="no caption layer"):
        edit(storage, 0, "a cat", layer="nothing")
    store.write_given_layer(storage, "people", {KEY[0]: {"short": "x"}})
    store.write_given_layer(storage, "people-edited", {KEY[0]: {"short": "x"}})
    with pytest.raises(RecipeError, match="does not lie over people"):
        edit(storage, 0, "a cat", layer="people")
