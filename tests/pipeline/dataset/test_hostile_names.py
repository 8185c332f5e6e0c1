"""Names that a stranger wrote into a manifest, a marker or a layer: nothing outside the dataset is read or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_dataset import write_dataset

from capstan.pipeline.dataset.shards import MANIFEST, Dataset, read_manifest
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage
from capstan.recaption.store import find_layer, list_layers, write_given_layer

NAMES = ["../x", "..", ".", "", "/etc/passwd", "a/../../x", "a\0b", "a\\b", "..\\x", "a/b", "a\nb", "x" * 5000]
UNICODE = ["\u2025/x", "\uff0e\uff0e\uff0fx", "shard\u2215x", "a\u202eb", "shard-٠", "e\u0301"]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "ds"))
    write_dataset(storage, [[1, 2], [3]])
    for outside in ("x.tar", "x.parquet", "x"):
        (tmp_path / outside).write_text("precious")
    return storage


def edit(storage: Storage, *place: str | int, value: Any) -> None:
    """Change one field of the manifest, as a stranger would: without its seal."""
    whole = json.loads(storage.read(MANIFEST))
    at = whole
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    storage.write(MANIFEST, json.dumps(whole).encode())


def refused(storage: Storage, field: str) -> None:
    with pytest.raises(CapstanError, match=rf"is not a manifest: {field}") as error:
        Dataset(storage)
    assert "\n" not in str(error.value)
    (problem,) = verify(storage)
    assert problem.startswith(f"{MANIFEST}: ")


@pytest.mark.parametrize("name", NAMES + UNICODE)
def test_hostile_names_in_a_manifest_are_refused_when_it_is_read(storage: Storage, name: str) -> None:
    whole = storage.read(MANIFEST)
    edit(storage, "shards", 1, "name", value=name)
    refused(storage, r"shards\.1\.name")
    storage.write(MANIFEST, whole)
    edit(storage, "ledger", value=[{"name": name, "rows": 1, "sha256": "0" * 64}])
    refused(storage, r"ledger\.0\.name")
    if name:  # an empty sum is that of a dataset of an older version
        storage.write(MANIFEST, whole)
        edit(storage, "shards", 0, "sha256", value=name)
        refused(storage, r"shards\.0\.sha256")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("a/b",)])
def test_hostile_names_of_indexes_are_refused(storage: Storage, name: str) -> None:
    edit(storage, "indexes", value={name: "0" * 64})
    refused(storage, "indexes")


@pytest.mark.parametrize(("field", "value"), [("samples", -1), ("bytes", -1), ("samples", "many"), ("name", None)])
def test_other_values_that_cannot_be_are_refused(storage: Storage, field: str, value: Any) -> None:
    edit(storage, "shards", 0, field, value=value)
    refused(storage, rf"shards\.0\.{field}")


def test_a_shard_that_is_listed_twice_is_refused(storage: Storage) -> None:
    manifest = read_manifest(storage)
    assert manifest is not None
    edit(storage, "shards", 1, "name", value=manifest.shards[0].name)
    with pytest.raises(CapstanError, match="twice"):
        Dataset(storage)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("", "a/b")])
def test_a_storage_neither_reads_nor_writes_nor_removes_outside_itself(storage: Storage, name: str) -> None:
    tries = [
        storage.exists,
        storage.read,
        storage.open,
        storage.size,
        storage.delete,
        storage.names,
        storage.local_path,
        lambda name: storage.write(name, b"x"),
        lambda name: storage.read_range(name, 0, 1),
    ]
    for attempt in tries:
        with pytest.raises(RecipeError, match="not a name inside it") as error:
            attempt(name)
        assert len(str(error.value)) < 1000
    outside = Path(storage.url).parent
    assert {path.read_text() for path in outside.iterdir() if path.is_file()} == {"precious"}
    assert len([path for path in outside.iterdir() if path.is_file()]) == 3


@pytest.mark.parametrize("name", [*NAMES, *UNICODE])
def test_hostile_names_of_layers_are_refused(storage: Storage, name: str) -> None:
    write_given_layer(storage, "mine", {})
    with pytest.raises(RecipeError, match="no caption layer"):
        find_layer(storage, name)
    recipe = json.loads(storage.read("captions/mine/recipe.json"))
    storage.write("captions/mine/recipe.json", json.dumps(recipe | {"layer": name}).encode())
    with pytest.raises(CapstanError, match="names another layer"):
        find_layer(storage, "mine")
    with pytest.raises(CapstanError, match="names another layer"):
        list_layers(storage)
