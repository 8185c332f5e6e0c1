"""The loader hands on what it is given, in order, however many workers and threads share the work."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.storage import Storage
from capstan.training.config import Data
from capstan.training.data.dataset import TrainingData
from capstan.training.data.loader import Loader
from capstan.training.data.mixture import MixedData


def open_data(folder: Path, data: Data | None = None, **options) -> TrainingData:
    return TrainingData(Dataset(Storage(str(folder))), data or Data(layer=None), 7, **{"layer": None, **options})


def numbers(
    data: TrainingData | MixedData, start: int, stop: int, world: int, batch: int = 8, threads: int = 2
) -> list[str]:
    """The keys of the steps [start, stop) of all ranks, in the order of the global batches."""
    steps: dict[int, list[str]] = {}
    for rank in range(world):
        with Loader(
            data, lambda _: {}, batch=batch, start=start, stop=stop, rank=rank, world=world, threads=threads
        ) as loader:
            for prepared in loader:
                steps.setdefault(prepared.step, []).extend(prepared.keys)
    return [key for step in sorted(steps) for key in steps[step]]


def test_any_number_of_ranks_sees_the_same_sequence(squares: Path) -> None:
    data = open_data(squares)
    whole = numbers(data, 0, 16, world=1)
    assert Counter(whole) == dict.fromkeys(whole, 2)  # two epochs of 64
    assert numbers(data, 0, 16, world=4) == whole
    assert numbers(data, 0, 5, world=2) + numbers(data, 5, 16, world=1) == whole


WORLDS = st.sampled_from([1, 2, 3, 4, 6])


@settings(max_examples=12, deadline=None)
@given(pieces=st.lists(st.tuples(WORLDS, st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=4))
@pytest.mark.parametrize("kind", ["squares", "buckets", "mixed", "mixed buckets"])
def test_a_run_that_changes_its_workers_sees_the_same_sequence(
    shaped: Path, squares: Path, kind: str, pieces: list[tuple[int, int, int]]
) -> None:
    """Pieces of a run: so many ranks, so many threads, so many steps."""
    data = make_data(shaped, squares, kind)
    done, keys = 0, []
    for world, threads, steps in pieces:
        keys += numbers(data, done, done + steps, world, batch=12, threads=threads)
        done += steps
    assert keys == [data.at(number).key for number in range(12 * done)]


def make_data(shaped: Path, squares: Path, kind: str) -> TrainingData | MixedData:
    buckets = {"sizes": [(12, 16), (16, 16), (16, 12)]} if "buckets" in kind else None
    settings = Data.model_validate({"layer": None, "block": 2, "buckets": buckets})
    parts = [open_data(folder, settings, batch=12) for folder in (shaped, squares)]
    if "mixed" not in kind:
        return parts[0]
    return MixedData(parts, ["shaped", "squares"], [0.7, 0.3], 7, 12 if buckets else 1)


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
