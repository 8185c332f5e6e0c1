"""Samples by number → prepared batches, step by step, made ahead on background threads.

Threads, not processes: what takes time (reading, decoding, scaling) leaves Python's lock free, and a batch is handed on
without being copied (`make bench-loader`).
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
        """The sample that comes as `number`."""


@dataclass(frozen=True)
class LoadedBatch:
    """One worker's share of a step's batch."""

    step: int
    batch: Batch
    keys: list[str]
    slots: Counter[str]  # how many captions came from which slot


class Loader:
    """Prepares batches ahead on background threads and hands them out step by step.

    An error in `prepare` is raised where its batch is asked for. Close it, or use it as a context manager.
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
        cv2.setNumThreads(1)  # these threads are as many as are wanted
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._ahead: deque[Future[LoadedBatch]] = deque()

    def __iter__(self) -> Iterator[LoadedBatch]:
        while self.step < self.stop:
            while len(self._ahead) < min(self._prefetch, self.stop - self.step):
                self._ahead.append(self._threads.submit(self._load, self.step + len(self._ahead)))
            prepared = self._ahead.popleft().result()
            self.step += 1
            yield prepared

    def _load(self, step: int) -> LoadedBatch:
        first = step * self.batch + self.rank * self.share
        samples = [self.data.at(number) for number in range(first, first + self.share)]
        slots = Counter(sample.slot for sample in samples)
        return LoadedBatch(step, self.prepare(samples), [sample.key for sample in samples], slots)

    def close(self) -> None:
        """Drop what is prepared and end the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
