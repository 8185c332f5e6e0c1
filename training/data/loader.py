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

from capstan.pipeline.errors import CapstanError, DamagedFile, RecipeError
from capstan.training.data.bad_samples import BadSamples, Location
from capstan.training.family import Batch, Sample


class IndexedSamples(Protocol):
    """An endless sequence of samples (`dataset.TrainingData`, `mixture.MixedData`)."""

    def at(self, number: int) -> Sample:
        """Return sample `number`."""

    def locate(self, number: int) -> Location:
        """Return where sample `number` is stored."""


@dataclass(frozen=True)
class LoadedBatch:
    """One worker's share of a step's batch."""

    step: int
    batch: Batch
    keys: list[str]
    slots: Counter[str]  # number of captions from each slot


class Loader:
    """Iterator over prepared batches, step by step, prefetched on background threads.

    A sample that cannot be read or prepared is replaced by the nearest other sample of the step's batch, as far as
    `bad` allows; all other samples keep their place. Else an error that names it is raised when its batch is requested.
    Close it, or use it as a context manager.
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
        bad: BadSamples | None = None,
    ) -> None:
        if batch % world:
            raise RecipeError("train.batch", f"{batch} is not a multiple of {world} workers", "change one of them")
        self.data, self.prepare, self.batch = data, prepare, batch
        self.step, self.stop, self.rank, self.share = start, stop, rank, batch // world
        self._bad = bad or BadSamples()
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
        numbers = range(first, first + self.share)
        try:
            samples = [self.data.at(number) for number in numbers]
            batch = self.prepare(samples)
        except Exception as error:
            if not _is_of_a_sample(error):
                raise
            samples = self._sound_samples(step, numbers)
            batch = self.prepare(samples)
        slots = Counter(sample.slot for sample in samples)
        return LoadedBatch(step, batch, [sample.key for sample in samples], slots)

    def _sound_samples(self, step: int, numbers: range) -> list[Sample]:
        """Return the samples with those that cannot be prepared replaced. Raises CapstanError if `bad` forbids it."""
        samples = []
        for number in numbers:
            sample = self._check(number)
            if isinstance(sample, Exception):
                self._bad.add(self.data.locate(number), step, sample)
                sample = self._stand_in(step, number, sample)
            samples.append(sample)
        return samples

    def _stand_in(self, step: int, number: int, error: Exception) -> Sample:
        """Return the nearest earlier, else later, sample of the step's batch: the same for any number of workers."""
        start, stop = step * self.batch, (step + 1) * self.batch
        for other in [*range(number - 1, start - 1, -1), *range(number + 1, stop)]:
            sample = self._check(other)
            if not isinstance(sample, Exception):
                return sample
        where = self.data.locate(number)
        raise CapstanError(f"training: no sample of the batch of step {step} can be used; one is {where}") from error

    def _check(self, number: int) -> Sample | Exception:
        """Return sample `number`, or the error if it cannot be prepared on its own."""
        try:
            sample = self.data.at(number)
            self.prepare([sample])
        except Exception as error:
            if not _is_of_a_sample(error):
                raise
            return error
        return sample

    def close(self) -> None:
        """Discard prepared batches and end the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_of_a_sample(error: Exception) -> bool:
    """Return whether an error can be due to one sample: not to the storage, the recipe or the machine."""
    if isinstance(error, OSError):
        return error.errno is None  # Pillow's, of an image; the system's own have a number
    return isinstance(error, DamagedFile) or not isinstance(error, CapstanError | MemoryError)
