"""croissant.json is valid by mlcroissant, and its records are the samples of the tars."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from capstan.pipeline.dataset import croissant
from capstan.pipeline.dataset.shards import Dataset, read_manifest, write_manifest
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage


@pytest.fixture(scope="module")
def mlcroissant(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package, which reads where it may extract tars when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROISSANT_CACHE", str(tmp_path_factory.mktemp("croissant")))
        import mlcroissant

        return mlcroissant


def test_records_are_the_samples_of_the_tars(odd_dataset: Path, mlcroissant: Any) -> None:
    described = mlcroissant.Dataset(jsonld=str(odd_dataset / croissant.NAME))
    assert not described.metadata.issues.errors
    records = {record["samples/key"].decode(): record for record in described.records(record_set="samples")}
    dataset = Dataset(Storage(str(odd_dataset)))
    assert len(records) == 23
    for name in dataset.shard_names:
        for row in dataset.table(name).to_pylist():
            record = records[row["key"]]
            assert record["samples/caption"].decode() == row["caption"]
            assert record["samples/image"].size == (row["width"], row["height"])
            assert record["samples/sha256"].decode() == row["sha256"]


def test_every_tar_is_listed_with_its_sum(odd_dataset: Path) -> None:
    described = json.loads((odd_dataset / croissant.NAME).read_text())
    tars = [file for file in described["distribution"] if file["@type"] == "cr:FileObject"]
    manifest = Dataset(Storage(str(odd_dataset))).manifest
    assert [(tar["contentUrl"], tar["sha256"]) for tar in tars] == [(e.tar, e.sha256) for e in manifest.shards]


def test_a_dataset_of_a_version_without_it_verifies(odd_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(odd_dataset, tmp_path / "older")
    storage = Storage(str(tmp_path / "older"))
    manifest = read_manifest(storage)
    assert manifest is not None
    indexes = {name: value for name, value in manifest.indexes.items() if name != croissant.NAME}
    write_manifest(storage, manifest.model_copy(update={"indexes": indexes}))
    (tmp_path / "older" / croissant.NAME).unlink()
    assert verify(storage) == []
