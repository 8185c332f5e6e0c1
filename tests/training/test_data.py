"""The order is a pure function, the caption blend is what was asked for, and the loader hands on what it is given."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import RecipeError
from pipeline.shards import Dataset
from pipeline.storage import Storage
from recaption.store import write_given_layer
from training.config import Data
from training.data import Loader, Order, TrainingData, find_layer, permutation


def open_data(folder: Path, data: Data | None = None, **options) -> TrainingData:
    return TrainingData(Dataset(Storage(str(folder))), data or Data(layer=None), 7, **{"layer": None, **options})


def numbers(data: TrainingData, start: int, stop: int, world: int, batch: int = 8) -> list[str]:
    """The keys of the steps [start, stop) of all ranks, in the order of the global batches."""
    steps: dict[int, list[str]] = {}
    for rank in range(world):
        with Loader(
            data, lambda _: {}, batch=batch, start=start, stop=stop, rank=rank, world=world, threads=2
        ) as loader:
            for prepared in loader:
                steps.setdefault(prepared.step, []).extend(prepared.keys)
    return [key for step in sorted(steps) for key in steps[step]]


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_permutation_holds_every_number_once_and_depends_on_the_seed_alone(count: int) -> None:
    assert sorted(permutation(count, 3)) == list(range(count))
    assert (permutation(count, 3) == permutation(count, 3)).all()
    assert count < 3 or (permutation(count, 3) != permutation(count, 4)).any()


def test_permutation_is_the_same_for_ever() -> None:
    assert permutation(8, 1).tolist() == [4, 3, 7, 0, 1, 5, 6, 2]


def test_permutation_is_spread_evenly() -> None:
    places = np.array([np.argsort(permutation(50, seed))[7] for seed in range(2000)])
    assert abs(places.mean() - 24.5) < 1.5
    assert len(set(places)) == 50


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_every_sample_comes_once_an_epoch(block: int) -> None:
    counts = [5, 1, 7, 3, 4]
    order = Order(counts, block, seed=1)
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    epochs = [[order(number) for number in range(20 * e, 20 * e + 20)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {place[0] for place in epoch} == {number}
        assert {place[1:] for place in epoch} == everything
    assert [place[1:] for place in epochs[0]] != [place[1:] for place in epochs[1]]


def test_reads_stay_within_a_block_of_shards() -> None:
    order = Order([100] * 12, 3, seed=1)
    for window in range(4):
        assert len({order(300 * window + i)[1] for i in range(300)}) == 3


def test_a_place_late_in_a_large_epoch_is_found_at_once() -> None:
    order = Order([10_000] * 1000, 8, seed=0)
    assert order(9_999_999)[0] == 0


def test_any_number_of_ranks_sees_the_same_sequence(squares: Path) -> None:
    data = open_data(squares)
    whole = numbers(data, 0, 16, world=1)
    assert Counter(whole) == dict.fromkeys(whole, 2)  # two epochs of 64
    assert numbers(data, 0, 16, world=4) == whole
    assert numbers(data, 0, 5, world=2) + numbers(data, 5, 16, world=1) == whole


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
    layer = captioned / "captions" / "x"
    (layer / "shard-000000.parquet").write_bytes((layer / "shard-000001.parquet").read_bytes())
    data = open_data(captioned, Data(layer="x"), layer="x")
    with pytest.raises(RecipeError, match=r"train\.data\.layer: .* of an earlier version of that shard.*recaption"):
        data.sample(0)


def test_a_layer_that_lacks_slots_or_shards_is_refused_at_once(captioned: Path) -> None:
    storage = Storage(str(captioned))
    assert find_layer(storage, Data(layer="x")) == "x"
    with pytest.raises(RecipeError, match=r"train\.data\.blend: layer x has no slot 'descriptve'.*mean descriptive"):
        find_layer(storage, Data(layer="x", blend={"descriptve": 1}))
    (captioned / "captions" / "x" / "shard-000001.parquet").unlink()
    with pytest.raises(RecipeError, match=r"train\.data\.layer: layer x has no captions of shard-000001"):
        find_layer(storage, Data(layer="x"))


def test_latents_stand_in_for_pictures(squares: Path) -> None:
    def latents(shard: str) -> np.ndarray:
        return np.full((20, 4, 2, 2), int(shard[-1]), dtype=np.float16)

    sample = open_data(squares, latents=latents).sample(25)
    assert sample.jpeg == b""
    assert sample.latent is not None
    assert sample.latent.shape == (4, 2, 2)
    assert sample.latent.max() == 1


def test_loader_prepares_ahead_and_in_order(squares: Path) -> None:
    started = threading.Event()

    def prepare(samples):
        if samples[0].key == third:
            started.set()
        return {"length": torch.tensor([len(sample.jpeg) for sample in samples])}

    data = open_data(squares)
    third = data.at(16).key
    with Loader(data, prepare, batch=8, start=0, stop=10**9, prefetch=3) as loader:
        first = next(iter(loader))
        assert started.wait(10)
        assert first.batch["length"].shape == (8,)
        assert first.slots == {"original": 8}


def test_an_error_in_prepare_reaches_the_loop(squares: Path) -> None:
    def prepare(samples):
        raise ValueError("bad pixels")

    with (
        Loader(open_data(squares), prepare, batch=8, start=0, stop=3) as loader,
        pytest.raises(ValueError, match="bad pixels"),
    ):
        next(iter(loader))


def test_loader_ends_where_it_is_told(squares: Path) -> None:
    with Loader(open_data(squares), lambda _: {}, batch=8, start=2, stop=5, threads=3) as loader:
        assert [prepared.step for prepared in loader] == [2, 3, 4]
