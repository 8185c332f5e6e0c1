"""Samples are the dataset's own, the caption blend is what was asked for, and what is held out stays so."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_dataset import as_if_a_model_wrote_it

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption.store import write_given_layer
from capstan.training.config import Data
from capstan.training.data.dataset import TrainingData
from capstan.training.data.order import hash64
from capstan.training.data.sources import find_layer


def open_data(folder: Path, data: Data | None = None, **options) -> TrainingData:
    return TrainingData(Dataset(Storage(str(folder))), data or Data(layer=None), 7, **{"layer": None, **options})


def test_samples_are_the_datasets_own(squares: Path) -> None:
    data = open_data(squares)
    images = dict(Dataset(Storage(str(squares))).read_images("shard-000000"))
    for index in (0, 7, 19):
        sample = data.sample(index)
        assert sample.jpeg == images[sample.key]
        assert sample.text == f"a {['red', 'green', 'blue', 'yellow'][index % 4]} square, number {index}"
        assert (sample.slot, sample.width, sample.extra) == ("original", 16, f'{{"index":{index}}}')
        assert sample.rng().random() == data.sample(index).rng().random() != data.sample(index, epoch=1).rng().random()
    assert len(list(data.captions())) == 64


def test_held_out_samples_are_never_trained_on(squares: Path) -> None:
    data = open_data(squares, Data(layer=None, holdout=10))
    held = {data.sample(index).key for index in range(len(data), data.total)}
    assert len(data) == 54
    assert len(held) == 10
    assert not held & {data.at(number).key for number in range(108)}
    with pytest.raises(RecipeError, match=r"train\.data\.holdout"):
        open_data(squares, Data(layer=None, holdout=64))


@pytest.fixture
def captioned(squares: Path, tmp_path: Path) -> Path:
    """A copy with the layer `x`: a descriptive caption of all but the first image of each shard."""
    folder = Path(shutil.copytree(squares, tmp_path / "captioned"))
    dataset, texts = Dataset(Storage(str(folder))), {}
    for shard in dataset.shard_names:
        keys = dataset.table(shard, ["key"])["key"].to_pylist()
        texts |= {key: {"descriptive": f"about {key}"} for key in keys[1:]}
    write_given_layer(dataset.storage, "x", texts)
    return folder


def test_captions_are_drawn_by_weight_and_redrawn_each_epoch(captioned: Path) -> None:
    data = open_data(captioned, Data(layer="x", blend={"descriptive": 3, "original": 1}), layer="x")
    samples = [data.at(number) for number in range(64 * 20)]
    slots = Counter(sample.slot for sample in samples)
    assert slots["descriptive"] / len(samples) == pytest.approx(0.75 * 60 / 64, abs=0.03)
    assert all(sample.text == f"about {sample.key}" for sample in samples if sample.slot == "descriptive")
    by_epoch = [{s.key: s.slot for s in samples if s.epoch == epoch} for epoch in range(2)]
    assert by_epoch[0] != by_epoch[1]
    assert [s.slot for s in samples] == [data.at(number).slot for number in range(64 * 20)]


def test_captions_of_another_shard_are_refused(captioned: Path) -> None:
    as_if_a_model_wrote_it(Storage(str(captioned)), "x")
    layer = captioned / "captions" / "x"
    (layer / "shard-000000.parquet").write_bytes((layer / "shard-000001.parquet").read_bytes())
    data = open_data(captioned, Data(layer="x"), layer="x")
    with pytest.raises(RecipeError, match=r"train\.data\.layer: .* earlier version of that shard.*recaption"):
        data.sample(0)


def test_a_layer_without_any_caption_in_a_slot_is_refused(captioned: Path) -> None:
    storage = Storage(str(captioned))
    for name in storage.names("captions/x"):
        if name.endswith(".parquet"):
            table = storage.read_table(name)
            flags = [["failed", "http_503"]] * len(table)
            place, field = table.schema.get_field_index("text"), table.schema.field("text")
            table = table.set_column(place, field, [[""] * len(table)])
            place, field = table.schema.get_field_index("flags"), table.schema.field("flags")
            storage.write_table(name, table.set_column(place, field, pa.array(flags, field.type)))
    with pytest.raises(RecipeError, match=r"train\.data\.layer: layer x has no caption in slot descriptive"):
        find_layer(storage, Data(layer="x"))
    find_layer(storage, Data(layer="x", blend={"original": 1}))


def test_a_layer_that_lacks_slots_or_shards_is_refused_at_once(captioned: Path) -> None:
    storage = Storage(str(captioned))
    assert find_layer(storage, Data(layer="x")) == "x"
    with pytest.raises(RecipeError, match=r"train\.data\.blend: layer x has no slot 'descriptve'.*mean descriptive"):
        find_layer(storage, Data(layer="x", blend={"descriptve": 1}))
    (captioned / "captions" / "x" / "shard-000001.parquet").unlink()
    assert find_layer(storage, Data(layer="x")) == "x"  # people may leave samples out
    assert open_data(captioned, Data(layer="x"), layer="x").sample(25).slot == "original"
    as_if_a_model_wrote_it(storage, "x")
    with pytest.raises(RecipeError, match=r"train\.data\.layer: layer x has no captions of shard-000001"):
        find_layer(storage, Data(layer="x"))


def test_latents_stand_in_for_images(squares: Path) -> None:
    def latents(shard: str) -> np.ndarray:
        return np.full((20, 4, 2, 2), int(shard[-1]), dtype=np.float16)

    sample = open_data(squares, latents=latents).sample(25)
    assert sample.jpeg == b""
    assert sample.latent is not None
    assert sample.latent.shape == (4, 2, 2)
    assert sample.latent.max() == 1


def test_the_sequence_is_the_same_for_ever(squares: Path) -> None:
    """A run that an earlier version began goes on with the same samples and draws."""
    data = open_data(squares)
    samples = [data.at(number) for number in range(200)]
    assert hash64(*(f"{sample.key} {sample.epoch} {sample.seed}" for sample in samples)) == 15391684941882796523


def test_a_batch_of_buckets_has_one_size(shaped: Path) -> None:
    buckets = {"sizes": [(12, 16), (16, 16), (16, 12)]}
    data = open_data(shaped, Data.model_validate({"layer": None, "buckets": buckets}), batch=4)
    samples = [data.at(number) for number in range(60)]
    for start in range(0, 60, 4):
        assert len({sample.bucket for sample in samples[start : start + 4]}) == 1
    nearest = {(16, 16): (16, 16), (24, 16): (16, 12), (16, 24): (12, 16)}
    assert all(sample.bucket == nearest[sample.width, sample.height] for sample in samples)
    assert len({sample.bucket for sample in samples}) == 3
    assert data.sample(0).bucket is not None


def test_buckets_too_rare_for_a_batch_are_told_of(shaped: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_data(shaped, Data.model_validate({"layer": None, "buckets": {"sizes": [(16, 16), (16, 12)]}}), batch=20)
    assert "fewer samples than a batch" in caplog.text
    assert "16 × 12: 15" in caplog.text
