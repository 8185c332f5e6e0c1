"""A dataset → prepared batches, in an order that is a pure function of (seed, epoch, position).

    number (0, 1, 2, …) ──Order──▶ (epoch, shard, row) ──TrainingData──▶ Sample ──Loader──▶ batch of tensors

The loader's whole state is one integer: step s of a run with batches of B reads the samples s·B … s·B + B − 1 of one
endless sequence, and each worker takes its slice. So a run can stop at any step and go on with any number of workers.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import mmap
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import CapstanError, RecipeError
from pipeline.shards import Dataset
from pipeline.storage import Storage
from recaption.store import check_layer, latest_layer, layer_recipe, list_layers, read_layer
from training.config import ORIGINAL, Data
from training.family import Batch, Sample

logger = logging.getLogger(__name__)


def hash64(*parts: str | int) -> int:
    """A 64-bit integer that is the same everywhere for the same parts."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def permutation(count: int, seed: int) -> np.ndarray:
    """A permutation of 0 … count − 1 that depends on `seed` alone, not on a library's version (int64 [count]).

    Sorts by SplitMix64 of a counter (Steele, Lea & Flood 2014).
    """
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


class Order:
    """number → (epoch, shard, row): every row once an epoch.

    An epoch permutes the shards, cuts them into windows of `block` shards, and permutes the samples of a window: what
    is read within a while lies in a few shards. Finding a place costs the same wherever in the epoch it lies.
    """

    def __init__(self, counts: Sequence[int], block: int, seed: int) -> None:
        self.counts, self.block, self.seed = np.asarray(counts, dtype=np.int64), block, seed
        self.total = int(self.counts.sum())
        self._epoch = lru_cache(maxsize=2)(self._lay_out)
        self._window = lru_cache(maxsize=4)(self._permute)

    def __call__(self, number: int) -> tuple[int, int, int]:
        epoch, position = divmod(number, self.total)
        shards, window_starts = self._epoch(epoch)
        window = int(np.searchsorted(window_starts, position, side="right")) - 1
        order, row_starts = self._window(epoch, window)
        place = int(order[position - window_starts[window]])
        member = int(np.searchsorted(row_starts, place, side="right")) - 1
        return epoch, int(shards[window * self.block + member]), place - int(row_starts[member])

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order, and the position at which each window starts."""
        shards = permutation(len(self.counts), hash64(self.seed, "shards", epoch))
        starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
        return shards, starts[:-1][:: self.block]

    def _permute(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The window's samples in order, and the place at which each of its shards starts."""
        shards, _ = self._epoch(epoch)
        counts = self.counts[shards[window * self.block : (window + 1) * self.block]]
        order = permutation(int(counts.sum()), hash64(self.seed, "window", epoch, window))
        return order, np.concatenate([[0], np.cumsum(counts)])[:-1]


@dataclass(frozen=True)
class _Shard:
    """What is kept in memory of a shard that is being read."""

    columns: dict[str, pa.Array]
    layer: dict[str, dict[str, str]] = field(default_factory=dict)  # key → slot → text
    latents: np.ndarray | None = None  # [samples, ...] in tar order
    tar: mmap.mmap | None = None  # a local tar; unmapped when the last thread has let go of it


_COLUMNS = ["key", "caption", "width", "height", "original_width", "original_height", "extra", "offset", "size"]


class TrainingData:
    """Samples by number (in training order) or by index (in dataset order, held-out samples last).

    `layer` is a caption layer's id, or None for the original captions; `latents` gives a shard's latents [samples, ...]
    in tar order, which then stand in for the pictures. Safe to use from several threads.
    """

    def __init__(
        self,
        dataset: Dataset,
        data: Data,
        seed: int,
        *,
        layer: str | None,
        latents: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        self.dataset, self.seed, self.layer, self._latents = dataset, seed, layer, latents
        self.weights = data.weights if layer is not None else {ORIGINAL: 1.0}
        self.shards = dataset.shard_names
        counts = [entry.samples for entry in dataset.manifest.shards]
        self.total = sum(counts)
        if self.total <= data.holdout:
            where, mend = dataset.storage.url, "build a larger dataset, or hold out fewer samples"
            raise RecipeError("train.data.holdout", f"leaves nothing of {where} ({self.total} samples)", mend)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.order = Order(_without_last(counts, data.holdout), data.block, seed)
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._keep_open, self._lock = 2 * data.block + 2, Lock()

    def __len__(self) -> int:
        """How many samples are trained on in an epoch."""
        return self.order.total

    def identity(self) -> dict[str, Any]:
        """What decides which samples come: in checkpoints, to notice that the dataset has changed."""
        digest = hashlib.blake2b(digest_size=8)
        for entry in self.dataset.manifest.shards:
            digest.update(entry.sha256.encode())
        return {"samples": len(self), "shards": digest.hexdigest(), "layer": self.layer}

    def at(self, number: int) -> Sample:
        """The sample that comes as `number` in the endless training sequence."""
        epoch, shard, row = self.order(number)
        return self._sample(shard, row, epoch)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Sample `index` in dataset order (held-out samples from `len(self)` on), with the caption of `epoch`."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sample(shard, index - int(self._starts[shard]), epoch)

    def captions(self) -> Iterator[str]:
        """Every caption that the blend may show, in dataset order."""
        for number in range(len(self.shards)):
            shard = self._shard(number)
            keys, originals = (shard.columns[name].to_pylist() for name in ("key", "caption"))
            for key, original in zip(keys, originals, strict=True):
                texts = shard.layer.get(key, {}) | {ORIGINAL: original}
                yield from (texts[slot] for slot in self.weights if slot in texts)

    def _sample(self, number: int, row: int, epoch: int) -> Sample:
        shard = self._shard(number)
        values = {name: column[row].as_py() for name, column in shard.columns.items()}
        key, offset, size = values["key"], values.pop("offset"), values.pop("size")
        slot, text = self._caption(shard, key, values.pop("caption"), epoch)
        latent = None if shard.latents is None else np.asarray(shard.latents[row])
        jpeg = self._read(number, shard, offset, size) if latent is None else b""
        seed = hash64(self.seed, "sample", key, epoch) >> 1
        return Sample(jpeg=jpeg, text=text, slot=slot, epoch=epoch, seed=seed, latent=latent, **values)

    def _caption(self, shard: _Shard, key: str, original: str, epoch: int) -> tuple[str, str]:
        """(slot, text) drawn by (seed, key, epoch); a slot that the layer lacks for this key gives the original."""
        texts = shard.layer.get(key, {}) | {ORIGINAL: original}
        draw, slot = hash64(self.seed, "caption", key, epoch) / 2**64, ORIGINAL
        for slot, weight in self.weights.items():  # noqa: B007 - the last slot takes what rounding leaves
            draw -= weight
            if draw < 0:
                break
        return (slot, texts[slot]) if slot in texts else (ORIGINAL, original)

    def _read(self, number: int, shard: _Shard, offset: int, size: int) -> bytes:
        name = f"shards/{self.shards[number]}.tar"
        if shard.tar is not None:
            jpeg = shard.tar[offset : offset + size]
        else:
            jpeg = self.dataset.storage.read_range(name, offset, offset + size)
        if len(jpeg) != size:
            raise CapstanError(f"{self.dataset.storage.url}/{name} is cut: run `capstan verify`")
        return jpeg

    def _shard(self, number: int) -> _Shard:
        """The shard, from memory where it is being read already."""
        with self._lock:
            if number not in self._open:
                self._open[number] = self._load(self.shards[number])
                if len(self._open) > self._keep_open:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]

    def _load(self, name: str) -> _Shard:
        table = self.dataset.table(name, _COLUMNS)
        columns = {column: pa.concat_arrays(table[column].chunks) for column in _COLUMNS}
        layer: dict[str, dict[str, str]] = {}
        if self.layer is not None:
            check_layer(self.dataset.storage, self.layer, name, columns["key"].to_pylist())
            layer = read_layer(self.dataset.storage, self.layer, name)
        if self._latents is not None:
            return _Shard(columns, layer, latents=self._latents(name))
        path = self.dataset.storage.local_path(f"shards/{name}.tar")
        if path is None:
            return _Shard(columns, layer)
        with path.open("rb") as file:
            return _Shard(columns, layer, tar=mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def find_layer(storage: Storage, data: Data) -> str | None:
    """The id of the caption layer that `train.data.layer` asks for, or None for the original captions."""
    if data.layer is None:
        return None
    layer = latest_layer(storage) if data.layer == "latest" else data.layer
    if layer is None or layer not in list_layers(storage):
        problem = f"{storage.url} has no caption layer" + ("" if layer is None else f" {layer}")
        mend = "run `capstan recaption` first, or write layer: null to train on the original captions"
        raise RecipeError("train.data.layer", problem, mend)
    slots = [*layer_recipe(storage, layer)["slots"], ORIGINAL]
    for slot in data.weights:
        if slot not in slots:
            near = difflib.get_close_matches(slot, slots, n=1)
            mend = f"did you mean {near[0]}?" if near else f"its slots: {', '.join(slots)}"
            raise RecipeError("train.data.blend", f"layer {layer} has no slot {slot!r}", mend)
    written = set(storage.names(f"captions/{layer}"))
    for shard in Dataset(storage).shard_names:
        if f"captions/{layer}/{shard}.parquet" not in written:
            mend = "run `capstan recaption` to complete it"
            raise RecipeError("train.data.layer", f"layer {layer} has no captions of {shard}", mend)
    return layer


def _without_last(counts: Sequence[int], held_out: int) -> list[int]:
    """`counts` with the last `held_out` samples taken away, and no empty shards at the end."""
    ends = np.minimum(np.cumsum(counts), sum(counts) - held_out)
    return [int(count) for count in np.diff(ends, prepend=0) if count > 0]


@dataclass(frozen=True)
class Prepared:
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
        data: TrainingData,
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
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._ahead: deque[Future[Prepared]] = deque()

    def __iter__(self) -> Iterator[Prepared]:
        while self.step < self.stop:
            while len(self._ahead) < min(self._prefetch, self.stop - self.step):
                self._ahead.append(self._threads.submit(self._load, self.step + len(self._ahead)))
            prepared = self._ahead.popleft().result()
            self.step += 1
            yield prepared

    def _load(self, step: int) -> Prepared:
        first = step * self.batch + self.rank * self.share
        samples = [self.data.at(number) for number in range(first, first + self.share)]
        slots = Counter(sample.slot for sample in samples)
        return Prepared(step, self.prepare(samples), [sample.key for sample in samples], slots)

    def close(self) -> None:
        """Drop what is prepared and end the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
