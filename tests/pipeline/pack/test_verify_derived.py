"""Damage in what was made of a dataset: captions and latents that are flipped, cut or gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_dataset import as_if_a_model_wrote_it, write_dataset

from capstan.pipeline.config import fingerprint
from capstan.pipeline.dataset import tensor_file
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.pack.verify_derived import derived_files, file_problem, forget_derived, verify_derived
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog
from capstan.recaption.lint.linter import Settings
from capstan.recaption.store import layer_id, publish, read_layer, write_given_layer


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Two shards with a model's captions, committed."""
    storage = Storage(str(tmp_path / "ds"))
    write_dataset(storage, [[1, 2, 3], [4, 5]])
    dataset = Dataset(storage)
    keys = [key for shard in dataset.shard_names for key in dataset.table(shard, ["key"])["key"].to_pylist()]
    texts = {key: {"descriptive": f"a drawing of {key}, at length"} for key in keys}
    write_given_layer(storage, "x", texts)
    as_if_a_model_wrote_it(storage, "x")
    for shard in dataset.shard_names:
        MarkerLog(storage, "recaption-x").mark(shard, {})
    return storage


def derived(storage: Storage) -> list[str]:
    found = [file_problem(storage, name) for name in derived_files(storage)]
    return verify_derived(storage, Dataset(storage).manifest, [line for line in found if line is not None])


def test_whole_captions_are_no_problem(storage: Storage) -> None:
    assert derived(storage) == []


def test_a_flipped_bit_in_captions_is_seen_by_readers_and_by_verify(storage: Storage) -> None:
    name = "captions/x/shard-000001.parquet"
    data = bytearray(storage.read(name))
    data[60] ^= 4
    storage.write(name, bytes(data))
    (problem,) = derived(storage)
    assert problem.startswith(f"{name}: damaged (")
    with pytest.raises(DamagedFile, match=name):
        read_layer(storage, "x", "shard-000001")


def test_a_layer_over_one_that_is_gone_is_named(storage: Storage) -> None:
    write_given_layer(storage, "mine", {}, over="x")
    assert derived(storage) == []
    storage.delete("captions/x/recipe.json")
    assert derived(storage) == [
        "captions/mine/recipe.json: lies over the layer x, which is missing: restore that layer from a copy"
    ]


def test_a_deleted_caption_file_is_named(storage: Storage) -> None:
    storage.delete("captions/x/shard-000000.parquet")
    assert derived(storage) == ["captions/x/shard-000000.parquet: missing: run `capstan recaption` to make it again"]


def test_a_layer_that_is_not_complete_yet_is_no_damage(storage: Storage) -> None:
    MarkerLog(storage, "recaption-x").forget(["shard-000000"])
    storage.delete("captions/x/shard-000000.parquet")
    assert derived(storage) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"number": "1"}'])
def test_a_damaged_recipe_of_a_layer_is_named(storage: Storage, content: bytes) -> None:
    storage.write("captions/x/recipe.json", content)
    (problem,) = derived(storage)
    assert problem.startswith("captions/x/recipe.json: damaged")


def test_the_id_of_a_layer_and_of_latents_tells_a_changed_recipe(storage: Storage) -> None:
    settings, identity = Settings(), {"weights": "w", "size": 32}
    layer, encoder = layer_id({"engine": "e", "prompt": "p"}, settings), fingerprint(identity)
    publish(storage, layer, ["short"], {"engine": "e", "prompt": "p"}, settings)
    storage.write(f"latents/{encoder}/recipe.json", json.dumps(identity).encode())
    storage.write(f"latents/{encoder}/shard-000000.safetensors", tensor_file.save({"a": np.zeros(3)}, {}))
    assert derived(storage) == []
    for name, old, new in (
        (f"captions/{layer}/recipe.json", b'"prompt": "p"', b'"prompt": "q"'),
        (f"latents/{encoder}/recipe.json", b"32", b"33"),
    ):
        data = storage.read(name)
        assert old in data
        storage.write(name, data.replace(old, new))
        (problem,) = derived(storage)
        assert problem.startswith(f"{name}: damaged")
        storage.write(name, data)
    storage.delete(f"latents/{encoder}/recipe.json")
    assert derived(storage) == [f"latents/{encoder}/recipe.json: missing: run `capstan encode` to make it again"]


def test_what_a_model_made_is_forgotten_and_what_people_wrote_is_left(storage: Storage) -> None:
    write_given_layer(storage, "people", {})
    damaged = [
        f"captions/{layer}/{file}" for layer in ("x", "people") for file in ("shard-000000.parquet", "recipe.json")
    ]
    damaged += ["latents/e/shard-000001.safetensors", "latents/e/recipe.json", "review/mine.parquet", "dataset.json"]
    markers = {"recaption-x": MarkerLog(storage, "recaption-x"), "latents-e": MarkerLog(storage, "latents-e")}
    for unit in ("shard-000000-0123", "shard-000001-0123", "shard-0000010-0123"):
        markers["latents-e"].mark(unit, {})
    for name in damaged:
        storage.write(name, b"damaged")
    lines = forget_derived(storage, damaged)
    assert lines == [
        "captions/x/recipe.json: run `capstan recaption` to make it again",
        "captions/x/shard-000000.parquet: run `capstan recaption` to make it again",
        "latents/e/shard-000001.safetensors: run `capstan encode` to make it again",
    ]
    gone = {line.partition(": ")[0] for line in lines}
    assert {name for name in damaged if not storage.exists(name)} == gone
    assert set(markers["recaption-x"].read()) == {"shard-000001"}
    assert set(markers["latents-e"].read()) == {"shard-000000-0123", "shard-0000010-0123"}


def cut(data: bytes) -> bytes:
    return data[:-1]


def cut_in_header(data: bytes) -> bytes:
    return data[:30]


def empty(data: bytes) -> bytes:
    return b""


def shift(data: bytes) -> bytes:
    """Other offsets, of the same length: each row reads the one behind."""
    return data.replace(b"[0,24]", b"[2,26]")


def forget_the_checksum(data: bytes) -> bytes:
    return data.replace(b"file_sha256", b"file_sha257")


@pytest.mark.parametrize("damage", [cut, cut_in_header, empty, shift, forget_the_checksum])
def test_damage_in_a_tensor_file_is_seen(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    data = tensor_file.save({"latents": np.arange(12, dtype=np.float16).reshape(3, 4)}, {"shard_sha256": "f" * 64})
    tensor_file.check(data, "x")
    damaged = damage(data)
    assert damaged != data
    with pytest.raises(DamagedFile, match="x is damaged"):
        tensor_file.check(damaged, "x")
    (tmp_path / "x").write_bytes(damaged)
    with (tmp_path / "x").open("rb") as file, pytest.raises(DamagedFile, match="x is damaged"):
        tensor_file.check_file(file, "x")


def test_every_bit_of_a_tensor_file_counts() -> None:
    data = tensor_file.save({"a": np.arange(4, dtype=np.float16)}, {"shard_sha256": "0" * 64, "captions": "1"})
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            with pytest.raises(DamagedFile):
                tensor_file.check(bytes(damaged), "x")
