"""The embeddings of a dataset → one array in the user's cache

    <cache>/capstan/vectors/<dataset>-<sum>.f16     the embeddings, float16 [rows, dim], mapped into memory
    <cache>/capstan/vectors/<dataset>-<sum>.keys    the rows' keys, 16 bytes each, in the same order
    <cache>/capstan/vectors/<dataset>-<sum>.json    {dim, units: [[unit, rows], …]}; written last

The sum is of the names of the score files, which name what they hold: it belongs to one state of one dataset. Files of
an earlier state, which may hold what was taken down since, are removed when the next one is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import platformdirs
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import fingerprint
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.ingest.job import staged
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.score.store import EMBEDDINGS, ROOT, file_name
from capstan.pipeline.select.semantic.clusters import unit
from capstan.pipeline.storage import Storage
from capstan.pipeline.units.markers import MarkerLog

KEPT: Final = 2  # datasets whose embeddings stay in the cache; those used last
MOST_FILES: Final = 32  # unit files that are read for a few pairs
_KEY_BYTES: Final = 16
_SUFFIXES: Final = ("json", "f16", "keys", "usearch")


@dataclass(frozen=True)
class Source:
    """The score files of the scorer that kept the embeddings: unit and file, in the order of units."""

    model: dict[str, Any]  # identity of the CLIP (score.clip_model)
    files: tuple[tuple[str, str], ...]

    @property
    def sum(self) -> str:
        return fingerprint([file for _, file in self.files])


@dataclass(frozen=True)
class Vectors:
    """Embeddings of length 1, zeros for a row without one; the rows' keys and units."""

    rows: npt.NDArray[np.float16]
    keys: npt.NDArray[np.uint8]
    units: tuple[str, ...]
    ends: tuple[int, ...]  # of each unit's rows
    graph: Path  # file of their index, if there is one

    def key(self, row: int) -> str:
        """Return a row's key."""
        return bytes(self.keys[row]).hex()

    def unit(self, row: int) -> str:
        """Return the unit of a row."""
        return self.units[bisect_right(self.ends, row)]

    def row(self, key: str, unit: str) -> int | None:
        """Return the row of a key in a unit."""
        if unit not in self.units:
            return None
        number = self.units.index(unit)
        start = self.ends[number - 1] if number else 0
        wanted = np.frombuffer(bytes.fromhex(key), np.uint8)
        found = np.flatnonzero((self.keys[start : self.ends[number]] == wanted).all(axis=1))
        return start + int(found[0]) if len(found) else None


def find(storage: Storage) -> Source:
    """Return where the embeddings of a dataset are. Raises RecipeError if none were kept."""
    there = set(storage.names(ROOT))
    jobs = {name.split("/")[1] for name in storage.names("state") if name.startswith("state/ingest-")}
    marks = [staged(MarkerLog(storage, job).read()) for job in sorted(jobs)]
    units = sorted(max(marks, key=len, default={}).items())
    best: tuple[str, list[tuple[str, str]]] = ("", [])
    for scorer in sorted({name.split("/")[1] for name in there}):
        files = [(unit, file_name(scorer, one.table)) for unit, one in units]
        held = [(unit, file) for unit, file in files if file in there]
        if len(held) > len(best[1]) and _identity(storage, scorer).get("name") == EMBEDDINGS:
            best = scorer, held
    if not best[1]:
        hint = "set `embeddings: true` under score.clip and run `capstan score RECIPE` (it fetches nothing)"
        raise RecipeError("score.clip.embeddings", "no embeddings are kept", hint)
    return Source(dict(_identity(storage, best[0]).get("model", {})), tuple(best[1]))


def _identity(storage: Storage, scorer: str) -> dict[str, Any]:
    try:
        return storage.read_json(f"{ROOT}/{scorer}/recipe.json", "run `capstan score RECIPE` again")
    except FileNotFoundError:
        return {}


def load(
    storage: Storage, source: Source, folder: Path | None = None, said: Callable[[float], None] = lambda _: None
) -> Vectors:
    """Return the embeddings, copied into the cache unless they are there; `said` is told the share that is done."""
    folder = folder or platformdirs.user_cache_path("capstan") / "vectors"
    dataset = fingerprint(storage.url)
    base = folder / f"{dataset}-{source.sum}"
    _forget([file for file in folder.glob(f"{dataset}-*.json") if file.stem != base.name])
    if not base.with_suffix(".json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(storage, source, base, said)
        used = sorted(folder.glob("*.json"), key=lambda file: -file.stat().st_mtime)
        _forget(used[KEPT:])
    facts = json.loads(base.with_suffix(".json").read_text())
    os.utime(base.with_suffix(".json"))
    keys = np.memmap(base.with_suffix(".keys"), np.uint8, "r").reshape(-1, _KEY_BYTES)
    rows = np.memmap(base.with_suffix(".f16"), np.float16, "r").reshape(len(keys), facts["dim"])
    units, ends = tuple(unit for unit, _ in facts["units"]), tuple(accumulate(count for _, count in facts["units"]))
    return Vectors(rows, keys, units, ends, base.with_suffix(".usearch"))


def _write(storage: Storage, source: Source, base: Path, said: Callable[[float], None]) -> None:
    partial = base.with_name(f".partial-{os.getpid()}-{uuid.uuid4().hex}")
    vectors, keys = partial.with_suffix(".f16"), partial.with_suffix(".keys")
    units: list[tuple[str, int]] = []
    dim = 0
    try:
        with vectors.open("wb") as values, keys.open("wb") as names:
            tables = ahead(lambda pair: storage.read_table(pair[1], ["key", "embedding"]), source.files)
            for (unit, file), table in zip(source.files, tables, strict=True):
                block = _block(table)
                if dim not in (0, block.shape[1]):
                    raise CapstanError(f"{storage.url}/{file} has embeddings of {block.shape[1]} numbers, not {dim}")
                dim = block.shape[1]
                block.tofile(values)
                names.write(bytes.fromhex("".join(table["key"].to_pylist())))
                units.append((unit, len(table)))
                said(len(units) / len(source.files))
        vectors.replace(base.with_suffix(".f16"))
        keys.replace(base.with_suffix(".keys"))
        partial.write_text(json.dumps({"dim": dim, "units": units}))
        partial.replace(base.with_suffix(".json"))
    finally:
        for left in (vectors, keys, partial):
            left.unlink(missing_ok=True)


def cosines(
    storage: Storage, pairs: Sequence[tuple[str, str]], units: Mapping[str, str]
) -> dict[tuple[str, str], float]:
    """Return the cosine of each pair of keys of which both embeddings are read; `units`: key → its unit.

    A few unit files are read, `MOST_FILES` at most; nothing is cached. {} if no embeddings were kept.
    """
    try:
        source = find(storage)
    except RecipeError:
        return {}
    wanted = {units[key] for pair in pairs for key in pair if key in units}
    files = [file for unit, file in source.files if unit in wanted][:MOST_FILES]
    keys = pa.array(sorted({key for pair in pairs for key in pair}), pa.string())
    held: dict[str, npt.NDArray[np.float32]] = {}
    for table in ahead(lambda file: storage.read_table(file, ["key", "embedding"]), files):
        here = table.filter(pc.and_(pc.is_in(table["key"], keys), pc.is_valid(table["embedding"])))
        if len(here):
            held |= dict(zip(here["key"].to_pylist(), unit(_block(here)), strict=True))
    return {(a, b): float(held[a] @ held[b]) for a, b in pairs if a in held and b in held}


def _block(table: pa.Table) -> npt.NDArray[np.float16]:
    column = table["embedding"].combine_chunks()
    dim = column.type.list_size
    there = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.values.slice(column.offset * dim, len(column) * dim).to_numpy(zero_copy_only=False)
    return np.where(there[:, None], values.reshape(len(column), dim), np.float16(0))


def _forget(old: Sequence[Path]) -> None:
    """Remove the embeddings that these files describe, the description first."""
    with contextlib.suppress(OSError):
        for one in old:
            for suffix in _SUFFIXES:
                one.with_suffix(f".{suffix}").unlink(missing_ok=True)
