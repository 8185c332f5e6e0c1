"""The loader hands on what it is given, in order, however many workers and threads share the work."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import CapstanError, StorageError
from capstan.pipeline.storage import Storage
from capstan.training.config import Data
from capstan.training.data.bad_samples import BadSamples
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
    """Pieces of a run: numbers of ranks, threads and steps."""
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
        assert started.wait(120)
        assert first.batch["length"].shape == (8,)
        assert first.slots == {"original": 8}


def test_an_error_that_is_no_samples_reaches_the_loop(squares: Path) -> None:
    def prepare(samples):
        raise StorageError("read s3://x", "503", "wait")

    with (
        Loader(open_data(squares), prepare, batch=8, start=0, stop=3, bad=BadSamples(squares / "no", 9)) as loader,
        pytest.raises(StorageError, match="503"),
    ):
        next(iter(loader))


def refuse(*bad: str):
    """A `prepare` that cannot decode these keys."""

    def prepare(samples):
        for sample in samples:
            if sample.key in bad:
                raise ValueError("bad pixels\nand more")
        return {}

    return prepare


def test_a_sample_that_cannot_be_used_is_named_with_its_fix(squares: Path) -> None:
    data = open_data(squares)
    bad = data.at(5)
    with (
        Loader(data, refuse(bad.key), batch=8, start=0, stop=3) as loader,
        pytest.raises(
            CapstanError, match=rf"sample {bad.key} \({squares}/shards/shard-00000\d\.tar, row \d+\) .*skip: 100"
        ),
    ):
        next(iter(loader))


@pytest.mark.parametrize(("world", "threads"), [(1, 1), (2, 3), (8, 1)])
def test_skipped_samples_are_replaced_and_all_others_keep_their_place(
    squares: Path, tmp_path: Path, world: int, threads: int
) -> None:
    data = open_data(squares)
    plain = [data.at(number).key for number in range(24)]
    spoilt = {plain[0], plain[5], plain[6]}
    file, seen = tmp_path / "bad-samples.jsonl", [""] * 24
    for rank in range(world):
        bad = BadSamples(file, 3)
        options = {"batch": 8, "start": 0, "stop": 3, "rank": rank, "world": world, "threads": threads, "bad": bad}
        with Loader(data, refuse(*spoilt), **options) as loader:
            for loaded in loader:
                first = loaded.step * 8 + rank * 8 // world
                seen[first : first + 8 // world] = loaded.keys
    assert seen[0] == plain[1]  # the nearest one before in its batch, else behind
    assert seen[5:7] == [plain[4]] * 2
    assert [a == b for a, b in zip(seen, plain, strict=True)].count(False) == 3
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert {record["key"] for record in records} == spoilt  # each once, whoever met it
    assert {record["reason"] for record in records} == {"ValueError: bad pixels"}
    assert (bad.count(0), bad.count(1)) == (0, 3)


def test_the_number_of_skipped_samples_is_bounded(squares: Path, tmp_path: Path) -> None:
    data = open_data(squares)
    spoilt = [data.at(number).key for number in (1, 3, 17)]
    with Loader(data, refuse(*spoilt), batch=8, start=0, stop=3, bad=BadSamples(tmp_path / "bad", 2)) as loader:
        batches = iter(loader)
        assert len(next(batches).keys) == 8
        next(batches)
        with pytest.raises(CapstanError, match=r"train\.data\.bad\.skip is 2; 2 others are listed in .*skip: 4"):
            next(batches)


def test_a_batch_without_any_usable_sample_ends_the_run(squares: Path, tmp_path: Path) -> None:
    data = open_data(squares)
    spoilt = [data.at(number).key for number in range(8)]
    with (
        Loader(data, refuse(*spoilt), batch=8, start=0, stop=3, bad=BadSamples(tmp_path / "bad", 99)) as loader,
        pytest.raises(CapstanError, match="no sample of the batch of step 0 can be used"),
    ):
        next(iter(loader))


def test_loader_ends_where_it_is_told(squares: Path) -> None:
    with Loader(open_data(squares), lambda _: {}, batch=8, start=2, stop=5, threads=3) as loader:
        assert [prepared.step for prepared in loader] == [2, 3, 4]
