"""Layers: written once, read by key and slot, listed when published."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.errors import RecipeError
from pipeline.records import make_key
from pipeline.storage import Storage
from recaption import store
from recaption.store import Row

KEY = [make_key(str(number)) for number in range(5)]


def test_rows_come_back_as_they_were_written(build: Callable[..., Storage]) -> None:
    storage = build([[0, 1], [2]])
    rows = [
        (KEY[0], "aa", "short", Row.written("a dog .", 3, "end", 17)),
        (KEY[0], "aa", "descriptive", Row.written("a brown dog . on", 5, "length", 18)),
        (KEY[1], "bb", "short", Row.unreadable()),
    ]
    store.write_rows(storage, "layer", "shard-000000", rows)
    table = store.read_rows(storage, "layer", "shard-000000")
    assert table.schema == store.SCHEMA
    assert table.to_pylist()[1] == {
        "key": KEY[0],
        "sha256": "aa",
        "slot": "descriptive",
        "raw": "a brown dog . on",
        "text": "a brown dog.",
        "tokens": 5,
        "finish": "length",
        "seed": 18,
        "flags": ["unfinished"],
    }
    assert store.read_layer(storage, "layer", "shard-000000") == {
        KEY[0]: {"short": "a dog.", "descriptive": "a brown dog."}
    }
    with pytest.raises(FileNotFoundError):
        store.read_layer(storage, "layer", "shard-000001")
    first = storage.read(store.file_name("layer", "shard-000000"))
    store.write_rows(storage, "layer", "shard-000000", rows)
    assert storage.read(store.file_name("layer", "shard-000000")) == first


def test_layers_are_listed_in_the_order_of_publication(build: Callable[..., Storage]) -> None:
    storage = build([[0]])
    assert store.list_layers(storage) == []
    assert store.latest_layer(storage) is None
    store.publish(storage, "zebra", ["short"], {"engine": "x"})
    store.publish(storage, "ant", ["short"], {"engine": "y"})
    store.write_rows(storage, "unfinished", "shard-000000", [])
    assert store.list_layers(storage) == ["zebra", "ant"]
    recipe = storage.read("captions/zebra/recipe.json")
    store.publish(storage, "zebra", ["short"], {"engine": "x"})
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
    with pytest.raises(RecipeError, match="no name"):
        store.write_given_layer(storage, "../up", captions)


def test_layer_id_changes_with_the_engine_and_the_cleaner(monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.layer_id({"weights": "a"})
    assert first == store.layer_id({"weights": "a"})
    assert first != store.layer_id({"weights": "b"})
    monkeypatch.setattr(store.lint, "VERSION", 99)
    assert first != store.layer_id({"weights": "a"})
