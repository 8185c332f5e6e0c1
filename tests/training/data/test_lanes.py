"""In lanes each sample comes once an epoch, any workers see one sequence, and each reads its own shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.dataset.ratios import ratios_of
from capstan.pipeline.dataset.shards import Dataset, Manifest
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.storage import Storage
from capstan.training.config import Data, TrainConfig
from capstan.training.data import buckets
from capstan.training.data.dataset import TrainingData
from capstan.training.data.lanes import LaneBucketOrder, LaneOrder, Lanes, lanes_of
from capstan.training.data.mixture import MixedData
from capstan.training.data.order import Place
from capstan.training.run import Run

SIZES = {"sizes": [(12, 16), (16, 16), (16, 12)]}
MANY = settings(max_examples=60, deadline=None)
COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=12)
LANES, COLUMNS, BLOCKS, SEEDS = st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**40)


@MANY
@given(counts=COUNTS, lanes=LANES, block=BLOCKS, seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_sample_comes_once_an_epoch(counts: list[int], lanes: int, block: int, seed: int, epoch: int) -> None:
    order = Lanes(np.array(counts), lanes, block, seed)
    numbers = range(epoch * order.total, (epoch + 1) * order.total)
    everything = [Place(epoch, shard, row) for shard, count in enumerate(counts) for row in range(count)]
    assert sorted(map(order, numbers)) == everything
    windows = [order.window_of(number) for number in numbers]
    for number, window in zip(numbers, windows, strict=True):
        assert order(number).shard in order.shards_of(window)
        assert window.lane == number % lanes
    for lane in range(lanes):  # a lane reads window after window
        own = [window for window in windows if window.lane == lane]
        assert own == sorted(own)
    window = order.window_of(numbers[0])
    for _ in range(len(counts)):  # and the first one of the next epoch comes after its last
        assert window < order.after(window)
        window = order.after(window)
    assert window.epoch > epoch


@MANY
@given(counts=COUNTS, lanes=LANES, columns=COLUMNS, seed=SEEDS, start=st.integers(0, 10**9))
def test_a_batch_takes_as_much_of_each_lane(counts: list[int], lanes: int, columns: int, seed: int, start: int) -> None:
    order = LaneOrder(np.array(counts), lanes, 1, seed, lanes * columns)
    for number in range(start, start + 2 * order.batch):
        assert order.window_of(number).lane == number % order.batch // columns


@MANY
@given(counts=COUNTS, lanes=LANES, columns=COLUMNS, block=BLOCKS, seed=SEEDS)
def test_batches_of_lanes_have_one_bucket(counts: list[int], lanes: int, columns: int, block: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    buckets = [random.choice(3, count, p=[0.5, 0.45, 0.05]) for count in counts]
    numbers = np.stack([np.bincount(shard, minlength=3) for shard in buckets])
    batch, epochs = lanes * columns, 3
    order = LaneBucketOrder(numbers, lanes, block, seed, batch, lambda shard: buckets[shard])
    complete = int((numbers.sum(0) * epochs // batch).sum()) * batch
    places = [order(number) for number in range(complete)]
    for start in range(0, complete, batch):
        assert len({int(buckets[place.shard][place.row]) for place in places[start : start + batch]}) == 1
    seen = Counter(places)
    assert set(seen.values()) <= {1}
    for kind, total in enumerate(numbers.sum(0).tolist()):  # all but what waits for a batch
        own = sum(int(buckets[place.shard][place.row]) == kind for place in seen)
        assert own == total * epochs // batch * batch


def test_a_place_does_not_depend_on_what_was_read_before() -> None:
    counts = np.array([9, 7, 8, 5, 9, 9])
    buckets = [np.arange(count) % 3 for count in counts]
    numbers = np.stack([np.bincount(shard, minlength=3) for shard in buckets])

    def orders() -> list[Any]:
        return [LaneOrder(counts, 3, 1, 4, 12), LaneBucketOrder(numbers, 3, 1, 4, 12, lambda shard: buckets[shard])]

    for late, fresh in zip(orders(), orders(), strict=True):
        whole = [late(number) for number in range(600)]
        assert [fresh(number) for number in range(599, -1, -1)] == whole[::-1]


def test_the_order_of_lanes_is_the_same_for_ever() -> None:
    order = LaneOrder(np.array([3, 4, 3, 2]), 3, 1, 7, 6)
    places = [tuple(order(number)) for number in (0, 1, 2, 5, 6, 12, 10**9)]
    assert places == [
        (0, 3, 0),
        (0, 2, 1),
        (0, 3, 1),
        (0, 1, 3),
        (0, 2, 0),
        (1, 3, 0),
        (83333333, 1, 3),
    ]


def open_data(folder: Path, lanes: int, kind: str = "", **options: Any) -> TrainingData:
    section = {"layer": None, "block": 2, "buckets": SIZES if kind == "buckets" else None, **options.pop("data", {})}
    dataset = Dataset(Storage(str(folder)))
    return TrainingData(dataset, Data.model_validate(section), 7, layer=None, lanes=lanes, **{"batch": 12, **options})


@pytest.mark.parametrize("lanes", [2, 4, 6, 12])
@pytest.mark.parametrize("kind", ["squares", "buckets", "mixed"])
def test_any_number_of_workers_sees_the_same_sequence(shaped: Path, squares: Path, lanes: int, kind: str) -> None:
    """Each worker opens the data for its own share of the lanes."""

    def keys(world: int, steps: range) -> list[str]:
        datas = [make(world) for _ in range(world)]
        share = 12 // world
        numbers = (12 * step + row for step in steps for row in range(12))
        return [datas[number % 12 // share].at(number).key for number in numbers]

    def make(world: int) -> TrainingData | MixedData:
        options = {"world": world, "batch": lanes if kind == "mixed" else 12}
        parts = [open_data(folder, lanes, kind, **options) for folder in (shaped, squares)]
        return parts[0] if kind != "mixed" else MixedData(parts, ["a", "b"], [0.7, 0.3], 7, lanes, 12)

    whole = keys(1, range(15))
    for world in (2, 3, 4, 12):
        assert keys(world, range(15)) == whole
    assert keys(4, range(7)) + keys(2, range(7, 11)) + keys(1, range(11, 15)) == whole
    if kind == "squares":
        assert set(Counter(whole).values()) == {3}  # 180 of 60 samples


def test_datasets_are_mixed_by_a_sample_of_each_lane(shaped: Path, squares: Path) -> None:
    parts = [open_data(folder, 4, batch=4) for folder in (shaped, squares)]
    data = MixedData(parts, ["a", "b"], [0.75, 0.25], 7, 4, 64)
    batches = [[data._part(number)[0] for number in range(64 * step, 64 * step + 64)] for step in range(20)]
    assert {batch.count(0) for batch in batches} == {48}
    for batch in batches:  # all lanes have the same datasets in the same places
        assert batch == batch[:16] * 4
    places = [data._part(number) for number in range(64 * 5)]
    of_first = Counter(parts[0].order(number) for part, number in places if part == 0)
    assert len(of_first) == 240  # four epochs of 60
    assert Counter(place.epoch for place in of_first) == dict.fromkeys(range(4), 60)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_worker_opens_only_its_own_shards(make_dataset, tmp_path: Path, world: int) -> None:
    folder = make_dataset(tmp_path / "ds", [8] * 32)
    opened: list[list[int]] = []
    for rank in range(world):
        data = open_data(folder, 4, batch=16, world=world)
        opened.append([])
        load = data._open._load
        data._open._load = lambda number, own=opened[-1], load=load: own.append(number) or load(number)  # type: ignore
        share = 16 // world
        for step in range(16):
            for row in range(rank * share, (rank + 1) * share):
                data.at(16 * step + row)
    for own in opened:
        assert len(own) == len(set(own)) == 32 // world
    assert sorted(number for own in opened for number in own) == list(range(32))


def test_buckets_are_counted_in_the_manifest(shaped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With histograms no table is read to find the order, and the order is that without them."""
    dataset = Dataset(Storage(str(shaped)))
    counted = [
        entry.model_copy(update={"ratios": ratios_of(dataset.table(entry.name))}) for entry in dataset.manifest.shards
    ]
    read: list[str] = []
    shapes = buckets.shapes
    monkeypatch.setattr(buckets, "shapes", lambda data, shards: read.extend(shards) or shapes(data, shards))
    without = open_data(shaped, 3, "buckets")
    assert read == dataset.shard_names
    read.clear()
    known = Dataset(dataset.storage, Manifest(shards=counted))
    settings = Data.model_validate({"layer": None, "block": 2, "buckets": SIZES})
    data = TrainingData(known, settings, 7, layer=None, lanes=3, batch=12)
    assert read == []
    samples = [data.at(number) for number in range(180)]
    assert [sample.key for sample in samples] == [without.at(number).key for number in range(180)]
    nearest = {(16, 16): (16, 16), (24, 16): (16, 12), (16, 24): (12, 16)}
    assert all(sample.bucket == nearest[sample.width, sample.height] for sample in samples)

    held = settings.model_copy(update={"holdout": 4})
    data = TrainingData(known, held, 7, layer=None, lanes=3, batch=12)
    assert read == [counted[-1].name]  # of which not all samples are counted
    kept = {data.sample(index).key for index in range(56)}
    assert {data.at(number).key for number in range(12 * 40)} == kept

    wrong = Manifest(shards=[counted[0].model_copy(update={"ratios": counted[1].ratios}), *counted[1:]])
    with pytest.raises(DamagedFile, match=r"dataset\.json.*the aspect ratios of shard-000000 are not 20"):
        TrainingData(Dataset(dataset.storage, wrong), settings, 7, layer=None, lanes=3, batch=12)


def config(**section: Any) -> TrainConfig:
    return TrainConfig.model_validate({"model": "x:X", "run": "x", "steps": 4, **section})


def test_the_number_of_lanes_follows_from_batch_block_and_workers() -> None:
    two = [{"dataset": "a"}, {"dataset": "b"}]
    assert lanes_of(config(batch=64)) == 8
    assert lanes_of(config(batch=64, data={"block": 2})) == 2
    assert lanes_of(config(batch=64, engine={"workers": 32})) == 32
    assert lanes_of(config(batch=64, data={"lanes": 16})) == 16
    assert lanes_of(config(batch=16, data={"datasets": two})) == 2
    with pytest.raises(ValueError, match=r"batch 64 is not a multiple of data\.lanes"):
        config(batch=64, data={"lanes": 5})


def test_a_run_keeps_the_lanes_that_it_began_with(tmp_path: Path) -> None:
    def run(**section: Any) -> Run:
        return Run(config(batch=64, **section).model_copy(update={"run": str(tmp_path / "run")}))

    assert run().lanes == 8  # not started yet
    run().open({})
    assert run(engine={"workers": 32}).lanes == 8
    file = tmp_path / "run" / "recipe.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in content.items() if name != "lanes"}))
    run().open({})  # started by an earlier version
    assert run().lanes == 1
    for wrong in (0, "8", 7):
        file.write_text(json.dumps(content | {"lanes": wrong}))
        with pytest.raises(DamagedFile, match="lanes"):
            run().lanes  # noqa: B018
