"""Datasets are mixed in exact shares, each goes through its own epochs, and the mix is a pure function."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import Data
from capstan.training.data.dataset import TrainingData
from capstan.training.data.mixture import MixedData, Schedule


@pytest.mark.parametrize(
    "weights", [[1], [1, 1], [0.7, 0.2, 0.1], [5, 3, 1, 1, 1], [1 / 3, 1 / 7, 0.5], [0.999, 0.001]]
)
def test_shares_are_exact_over_any_stretch(weights: list[float]) -> None:
    schedule = Schedule(weights, seed=3)
    kinds = np.array([schedule(number)[0] for number in range(4000)])
    so_far = np.cumsum(kinds[:, None] == np.arange(len(weights)), axis=0)
    shares = np.array([float(share) for share in schedule.shares])
    assert shares == pytest.approx(np.array(weights) / sum(weights), abs=1e-4)
    drift = so_far - np.outer(np.arange(1, 4001), shares)
    assert (drift.max(0) - drift.min(0)).max() < 2  # so that no stretch of any length is off by two


def test_the_place_within_a_dataset_counts_up_by_one() -> None:
    schedule = Schedule([0.55, 0.25, 0.2], seed=0)
    seen = Counter[int]()
    for number in range(1000):
        kind, nth = schedule(number)
        assert nth == seen[kind]
        assert schedule.counts(number).tolist() == [seen[kind] for kind in range(3)]
        seen[kind] += 1
    assert schedule(10**12)[1] == pytest.approx(10**12 * [0.55, 0.25, 0.2][schedule(10**12)[0]], abs=2)


def test_the_schedule_depends_on_the_seed_alone() -> None:
    def kinds(seed: int) -> list[int]:
        schedule = Schedule([0.7, 0.2, 0.1], seed)
        return [schedule(number)[0] for number in range(20)]

    assert kinds(1) == kinds(1)
    assert len({tuple(kinds(seed)) for seed in range(10)}) > 3


def test_a_share_too_small_to_be_read_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.data\.datasets: weight 1e-06 is less than one in 10000"):
        Schedule([1, 1e-6], 0)


def mix(first: Path, second: Path, holdout: int = 0) -> MixedData:
    data = Data(layer=None, holdout=holdout)
    parts = [TrainingData(Dataset(Storage(str(folder))), data, 7, layer=None) for folder in (first, second)]
    return MixedData(parts, ["a", "b"], [3, 1], seed=7)


def test_each_dataset_goes_through_its_own_epochs(squares: Path, shaped: Path) -> None:
    data = mix(squares, shaped)
    samples = [data.at(number) for number in range(640)]
    ours = [sample for sample in samples if (sample.width, sample.height) == (24, 16)]  # 15 of the second's 60
    assert {sample.epoch for sample in samples} == set(range(8))  # 480 of 64
    assert Counter(sample.epoch for sample in ours)[0] == Counter(sample.epoch for sample in ours)[1] == 15
    facts = data.progress(640)
    assert facts == {"epoch": 640 / 124, "epoch/a": 7.5, "epoch/b": 160 / 60, "mix/a": 0.75, "mix/b": 0.25}


def test_held_out_samples_of_all_come_last(squares: Path, shaped: Path) -> None:
    data = mix(squares, shaped, holdout=5)
    assert (len(data), data.total) == (114, 124)
    trained = {data.sample(index).jpeg for index in range(len(data))}
    held = [data.sample(index).jpeg for index in range(len(data), data.total)]
    assert held == [part.sample(index).jpeg for part in data.parts for index in range(len(part), part.total)]
    assert {data.at(number).jpeg for number in range(400)} <= trained
    assert len(list(data.captions())) == 124
    assert data.identity().keys() == {"a", "b"}
