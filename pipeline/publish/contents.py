"""What is published of a dataset: the files that its manifest lists, with their sums

The published manifest differs from the dataset's own: it lists the ledger only if that is published too, and its recipe
names files without the folders that they are in. Rows that were removed are in no published file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import fingerprint
from capstan.pipeline.dataset import energon
from capstan.pipeline.dataset.croissant import PUBLISHED
from capstan.pipeline.dataset.indexes import indexes
from capstan.pipeline.dataset.shards import Dataset, LedgerEntry, Manifest, ShardEntry, listed, sha256_of
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.records import FORMAT_VERSION, REJECTED, REMOVED
from capstan.pipeline.secrets import public_url
from capstan.pipeline.storage import Storage, parquet_bytes

_READ_BYTES: Final = 4 << 20
_CAPTIONS: Final = "captions"
_BUILD: Final = "run `capstan build` again, then publish"


@dataclass(frozen=True)
class PublishedFile:
    """A file of the copy. `data` is its content; None: it is the dataset's own file of this name."""

    name: str
    size: int
    sha256: str
    data: bytes | None = None

    @classmethod
    def of(cls, name: str, data: bytes) -> PublishedFile:
        return cls(name, len(data), sha256_of(data), data)


@dataclass(frozen=True)
class Wishes:
    """What the user wants published, and what the card says besides what the dataset knows."""

    name: str
    url: str = ""
    contact: str = ""
    layers: tuple[str, ...] = ()
    ledger: bool = False
    fetched: bool = False  # the images come from the URLs of the rows, not with the source


def are_fetched(storage: Storage, manifest: Manifest) -> bool:
    """Return whether the images were fetched from the web, by the first shard: its rows have no image of their own."""
    if (manifest.recipe.get("source") or {}).get("image"):
        return False
    first = manifest.shards[0]
    urls = storage.read_table(first.table, ["url"], sha256=first.table_sha256)["url"]
    return bool(pc.any(pc.match_substring_regex(urls, "^(?i:https?:)?//")).as_py())


def ready(storage: Storage) -> Manifest:
    """Return the manifest of a dataset that can be published.

    Raises RecipeError if there is no dataset, if it is being rewritten, or if a removal is not finished.
    """
    manifest = Dataset(storage).manifest
    if manifest.format_version < FORMAT_VERSION:
        problem = f"{storage.url} was written by an older Capstan (format {manifest.format_version})"
        raise RecipeError(storage.field, problem, _BUILD)
    if storage.exists("removed/pending.parquet"):
        raise RecipeError(storage.field, f"a removal from {storage.url} is not finished", _BUILD)
    if not manifest.complete:
        raise RecipeError(storage.field, f"{storage.url} is incomplete", _BUILD)
    if not manifest.shards:
        raise RecipeError(storage.field, f"{storage.url} has no shard", "build a dataset that keeps some rows")
    return manifest


def contents(storage: Storage, manifest: Manifest, wishes: Wishes) -> tuple[Manifest, list[PublishedFile]]:
    """Return the published manifest and all files but itself and the card, shards first.

    Raises DamagedFile for a table that is not what was written.
    """
    files = [file for entry in manifest.shards for file in _shard(storage, entry)]
    recipe = public_recipe(manifest.recipe)
    recipe[PUBLISHED] = {"name": wishes.name, "url": wishes.url, "ledger": wishes.ledger}
    told: dict[str, Any] = {"recipe": recipe, "recipe_hash": fingerprint(recipe), "selection": "", "ledger": []}
    if wishes.ledger:
        tables = [_ledger(storage, entry) for entry in manifest.ledger]
        files += [file for file, _, _ in tables]
        hidden = sum(entry.rows - len_ for entry, (_, _, len_) in zip(manifest.ledger, tables, strict=True))
        told["ledger"] = [entry for _, entry, _ in tables]
        told["counts"] = _without(manifest.counts, hidden)
    files += [file for layer in wishes.layers for file in _layer(storage, manifest, layer)]
    published = manifest.model_copy(update=told)
    made = [PublishedFile.of(name, data) for name, data in indexes(published).items()]
    if sqlite := manifest.indexes.get(energon.INDEX):
        made.append(PublishedFile(energon.INDEX, storage.size(energon.INDEX), sqlite))
    sums = {file.name: file.sha256 for file in made}
    return published.model_copy(update={"indexes": sums}), [*files, *made]


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe whose files are named without their folders, and whose URLs are without credentials."""
    return {name: value if name == "select" else _public(value) for name, value in recipe.items()}


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "./", "../", "file://")):
        return value.rstrip("/").rpartition("/")[2]
    return public_url(value) if "://" in value else value


def _shard(storage: Storage, entry: ShardEntry) -> Iterator[PublishedFile]:
    with listed(storage.path(entry.table)):
        size = storage.size(entry.table)
    with listed(storage.path(entry.index)):
        index = storage.read(entry.index)
    yield PublishedFile(entry.tar, entry.bytes, entry.sha256)
    yield PublishedFile(entry.table, size, entry.table_sha256)
    yield PublishedFile.of(entry.index, index)


def _ledger(storage: Storage, entry: LedgerEntry) -> tuple[PublishedFile, LedgerEntry, int]:
    """Return a ledger table without the rows that were removed, its entry, and its number of rows."""
    table = storage.read_table(entry.table, sha256=entry.sha256)
    removed = pc.and_(pc.equal(table["outcome"], REJECTED), pc.equal(table["reason"], REMOVED))
    if not pc.any(removed).as_py():
        return PublishedFile(entry.table, storage.size(entry.table), entry.sha256), entry, len(table)
    left = table.filter(pc.invert(removed))
    file = PublishedFile.of(entry.table, parquet_bytes(left))
    return file, LedgerEntry(name=entry.name, rows=len(left), sha256=file.sha256), len(left)


def _without(counts: Mapping[str, int], removed: int) -> dict[str, int]:
    """Return the counts without the rows that were removed."""
    less = {"rows": removed, REJECTED: removed}
    return {name: count - less.get(name, 0) for name, count in counts.items()}


def layer_names(storage: Storage) -> list[str]:
    """Return the dataset's caption layers, by name."""
    parts = (name.split("/") for name in storage.names(_CAPTIONS) if name.endswith("/recipe.json"))
    return sorted(found[1] for found in parts if len(found) == 3)


def _layer(storage: Storage, manifest: Manifest, layer: str) -> Iterator[PublishedFile]:
    """Yield a layer's tables, with the rows of the published samples only, then its recipe."""
    recipe = f"{_CAPTIONS}/{layer}/recipe.json"
    own = [f"{_CAPTIONS}/{layer}/{entry.name}.parquet" for entry in manifest.shards]
    for entry, name in zip(manifest.shards, own, strict=True):
        if storage.exists(name):
            yield PublishedFile.of(name, parquet_bytes(_rows_of(storage, [entry], storage.read_table(name))))
    if _of_people(storage.read_json(recipe, _BUILD)):
        folder = storage.names(f"{_CAPTIONS}/{layer}")
        for name in sorted(name for name in folder if name.endswith(".parquet") and name not in own):
            if len(rows := _rows_of(storage, manifest.shards, storage.read_table(name))):
                yield PublishedFile.of(name, parquet_bytes(rows))
    yield PublishedFile.of(recipe, storage.read(recipe))


def _of_people(recipe: Mapping[str, Any]) -> bool:
    """Return whether people wrote a layer: its captions stay in the files of the shards as they were then."""
    return bool((recipe.get("engine") or {}).get("engine") == "given")


def _rows_of(storage: Storage, entries: Sequence[ShardEntry], table: pa.Table) -> pa.Table:
    """Return the rows of a layer's table whose samples are in these shards."""
    there = pa.nulls(len(table), pa.bool_()).fill_null(False)
    for entry in entries:
        keys = storage.read_table(entry.table, ["key"], sha256=entry.table_sha256)["key"]
        there = pc.or_(there, pc.is_in(table["key"], _set(keys)))
    return table.filter(there)


def _set(keys: pa.ChunkedArray) -> pa.Array:
    return pa.array(keys.to_pylist(), pa.string())


def check_layers(storage: Storage, names: Sequence[str]) -> tuple[str, ...]:
    """Return the layers to publish; `all` means every one. A layer comes with the one that it lies over.

    Raises RecipeError for one that does not exist.
    """
    known = layer_names(storage)
    for name in names:
        if name != "all" and name not in known:
            listed = ", ".join(known) or "the dataset has none"
            raise RecipeError("--layer", f"no caption layer {name!r} in {storage.url}", f"use one of: {listed}")
    if "all" in names:
        return tuple(known)
    below = [storage.read_json(f"{_CAPTIONS}/{name}/recipe.json", _BUILD).get("over") for name in names]
    return tuple(dict.fromkeys([*names, *(str(layer) for layer in below if layer)]))


def fetch(storage: Storage, file: PublishedFile, path: Path) -> None:
    """Write the content of `file` to the local `path`. Raises DamagedFile if the dataset's file has another sum."""
    if file.data is not None:
        path.write_bytes(file.data)
        return
    digest = hashlib.sha256()
    with listed(storage.path(file.name)):
        source = storage.open(file.name)
    with source, path.open("wb") as target:
        while data := source.read(_READ_BYTES):
            digest.update(data)
            target.write(data)
    if digest.hexdigest() != file.sha256:
        problem = "its SHA-256 is not the one in dataset.json, or it changed while it was published"
        raise DamagedFile(storage.path(file.name), problem)
