"""Open shards: table columns, captions, latents, bytes of images and other files

A local tar is read by mmap. In a bucket, a file is read from a copy in the cache (training.data.shard_cache), or by a
request of its own if there is none yet.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.dataset.shards import Dataset, check_image, listed
from capstan.pipeline.errors import RecipeError
from capstan.recaption.lint import linter
from capstan.recaption.store import check_layer, rows_of_shard
from capstan.training.data.shard_cache import ShardCache

_TEXT: Final = ["key", "caption", "extra"]
NUMBERS: Final = ["width", "height", "original_width", "original_height", "crop_left", "crop_top"]
TARS: Final = "shards/{}.tar"
JPG: Final = "jpg"


class ShardRows(Protocol):
    """A value for each of a shard's samples, in tar order."""

    def __getitem__(self, row: int, /) -> Any: ...


@dataclass
class OpenShard:
    """The data of one shard that is kept in memory."""

    text: dict[str, pa.Array]
    numbers: np.ndarray  # int64 [samples, NUMBERS]
    places: Mapping[str, np.ndarray]  # suffix → offset and size in the tar of each sample's file, int64 [samples, 2]
    crc32: Mapping[str, Sequence[int | None]]  # suffix → of each sample's file
    captions: Mapping[str, pa.Array] = field(default_factory=dict)  # slot → text of each sample, or null
    latents: ShardRows | None = None
    states: Mapping[str, ShardRows] | None = None  # SLOT.NAME → text encoders' output
    tar: mmap.mmap | None = None  # a local tar, unmapped when no thread uses it


class OpenShards:
    """A dataset's shards by number; the `keep` most recently used stay in memory.

    `latents` and `states` read those of a shard, given its name. `files` are the names of the files that the cache may
    hold ("{}" stands for the shard's name). `parts` are the suffixes of the samples' files that are read. Thread-safe:
    while one thread opens a shard, others use the open ones.
    """

    def __init__(
        self,
        dataset: Dataset,
        layer: str | None,
        keep: int,
        *,
        latents: Callable[[str], ShardRows] | None = None,
        states: Callable[[str], Mapping[str, ShardRows]] | None = None,
        cache: ShardCache | None = None,
        files: Sequence[str] = (TARS,),
        parts: Sequence[str] = (JPG,),
    ) -> None:
        self.dataset, self.layer, self._keep, self._parts = dataset, layer, keep, parts
        self._latents, self._states, self._cache, self._files = latents, states, cache, files
        self._open: OrderedDict[int, Future[OpenShard]] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, number: int) -> OpenShard:
        with self._lock:
            shard, mine = self._open.get(number), False
            if shard is None:
                shard, mine = self._open.setdefault(number, Future()), True
                if len(self._open) > self._keep:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
        if mine:
            try:
                shard.set_result(self._load(number))
            except BaseException as error:  # noqa: BLE001 - passed to all threads that wait for the shard
                with self._lock:
                    self._open.pop(number, None)  # the next request tries again
                shard.set_exception(error)
        return shard.result()

    def prefetch(self, number: int) -> None:
        """Copy the shard's files into the cache, in the background."""
        entry = self.dataset.manifest.shards[number]
        for name in (pattern.format(entry.name) for pattern in self._files):
            assert self._cache is not None
            self._cache.prefetch(name, entry.sha256, entry.sha256 if name == entry.tar else None)

    def file(self, number: int, shard: OpenShard, row: int, suffix: str = JPG) -> bytes:
        """Return a file of one of the shard's samples; empty if the sample has none.

        Raises DamagedFile if it is not what was written.
        """
        offset, size = (int(value) for value in shard.places[suffix][row])
        if not size:
            return b""
        entry = self.dataset.manifest.shards[number]
        data: bytes | None = None
        if shard.tar is not None:
            data = shard.tar[offset : offset + size]
        elif self._cache is not None:
            data = self._cache.read_range(entry.tar, entry.sha256, offset, offset + size)
        if data is None:
            with listed(self.dataset.storage.path(entry.tar)):
                data = self.dataset.storage.read_range(entry.tar, offset, offset + size)
        return check_image(data, size, shard.crc32[suffix][row], self.dataset.storage.path(entry.tar))

    def _load(self, number: int) -> OpenShard:
        name = self.dataset.manifest.shards[number].name
        columns = [_columns(part) for part in self._parts]
        table = self.dataset.table(name, [*_TEXT, *NUMBERS, "sha256", *(name for three in columns for name in three)])
        text = {column: pa.concat_arrays(table[column].chunks) for column in _TEXT}
        numbers = np.stack([table[column].to_numpy() for column in NUMBERS], axis=1)
        shard = OpenShard(text, numbers, *_places(table, self._parts))
        if self.layer is not None:
            check_layer(self.dataset.storage, self.layer, name, table)
            rows = rows_of_shard(self.dataset.storage, self.layer, name, table)
            shard.captions = captions_by_slot(rows, text["key"])
        if self._states is not None:
            shard.states = self._states(name)
        if self._latents is not None:
            shard.latents = self._latents(name)
            return shard
        path = self.dataset.storage.local_path(f"shards/{name}.tar")
        if path is not None:
            with listed(str(path)), path.open("rb") as file:
                shard.tar = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return shard


def check_parts(dataset: Dataset, parts: Sequence[str]) -> None:
    """Raise RecipeError if a dataset has no files with one of these suffixes; images may take the place of others."""
    if not dataset.manifest.shards or JPG in parts:
        return
    known = dataset.table(dataset.manifest.shards[0].name).column_names
    for part in parts:
        if _columns(part)[0] not in known:
            problem = f"the model reads files .{part}, and {dataset.storage.url} has none"
            raise RecipeError("dataset", problem, f"build it with source.parts: [{part}]")


def _columns(part: str) -> list[str]:
    """Return the columns of the shards' tables that tell where a sample's files are: offset, size, CRC-32."""
    before = "" if part == JPG else f"{part}_"
    return [f"{before}{name}" for name in ("offset", "size", "crc32")]


def _places(table: pa.Table, parts: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, Sequence[int | None]]]:
    """Return where the files with these suffixes are in the tar, and their CRC-32 sums if the table has them."""
    places: dict[str, np.ndarray] = {}
    sums: dict[str, Sequence[int | None]] = {}
    for part in parts:
        *where, crc32 = _columns(part)
        if where[0] not in table.column_names:  # a dataset of images alone
            places[part] = np.zeros((len(table), len(where)), np.int64)
            continue
        places[part] = np.stack([table[column].to_numpy() for column in where], axis=1)
        sums[part] = table[crc32].to_pylist() if crc32 in table.column_names else [None] * len(table)
    return places, sums


def captions_by_slot(rows: pa.Table, keys: pa.Array) -> dict[str, pa.Array]:
    """Return slot → the text of each key, null where the layer has none of its own: `store.texts_of` as columns.

    `rows` is what `rows_of_shard` returns; of several rows with one key and slot the first counts.
    """
    flags = rows["flags"].combine_chunks()
    own = pc.not_equal(rows["text"], "").to_numpy().copy()
    own[pc.list_parent_indices(flags).filter(pc.equal(pc.list_flatten(flags), linter.ORIGINAL)).to_numpy()] = False
    rows = rows.select(["key", "slot", "text"]).filter(pa.array(own))
    captions = {}
    for slot in pc.unique(rows["slot"]).to_pylist():
        part = rows.filter(pc.equal(rows["slot"], slot)).combine_chunks()
        places = pc.index_in(keys, part["key"].combine_chunks())
        captions[slot] = part["text"].combine_chunks().take(places)
    return captions
