"""Samples by number → prepared batches, on background threads

Threads, not processes: reading, decoding and scaling release Python's lock, and a batch is passed on without a copy
(`make bench-loader`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import cv2

from capstan.pipeline.errors import RecipeError
from capstan.training.family import Batch, Sample


class IndexedSamples(Protocol):
    """An endless sequence of samples (`dataset.TrainingData`, `mixture.MixedData`)."""

    def at(self, number: int) -> Sample:
        """Return sample `number`."""


@dataclass(frozen=True)
class LoadedBatch:
    """One worker's share of a step's batch."""

    step: int
    batch: Batch
    keys: list[str]
    slots: Counter[str]  # number of captions from each slot


class Loader:
    """Iterator over prepared batches, step by step, prefetched on background threads.

    An error in `prepare` is raised when its batch is requested. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        data: IndexedSamples,
        prepare: Callable[[Sequence[Sample]], Batch],
        *,
        batch: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 4,
        threads: int = 1,
    ) -> None:
        if batch % world:
            raise RecipeError("train.batch", f"{batch} is not a multiple of {world} workers", "change one of them")
        self.data, self.prepare, self.batch = data, prepare, batch
        self.step, self.stop, self.rank, self.share = start, stop, rank, batch // world
        self._prefetch = max(prefetch, threads)
        cv2.setNumThreads(1)  # these threads are enough
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._pending: deque[Future[LoadedBatch]] = deque()

    def __iter__(self) -> Iterator[LoadedBatch]:
        while self.step < self.stop:
            while len(self._pending) < min(self._prefetch, self.stop - self.step):
                self._pending.append(self._threads.submit(self._load, self.step + len(self._pending)))
            loaded = self._pending.popleft().result()
            self.step += 1
            yield loaded

    def _load(self, step: int) -> LoadedBatch:
        first = step * self.batch + self.rank * self.share
        samples = [self.data.at(number) for number in range(first, first + self.share)]
        slots = Counter(sample.slot for sample in samples)
        return LoadedBatch(step, self.prepare(samples), [sample.key for sample in samples], slots)

    def close(self) -> None:
        """Discard prepared batches and end the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
