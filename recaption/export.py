"""A dataset and a layer → a copy of the dataset with the layer's captions

KEY.txt and the `caption` of KEY.json become the text of one slot, or stay the same if the layer has no text. All texts,
including the original, go into KEY.json's `extra` under `capstan`. No tar member is added: open_clip and most training
scripts read only `txt`, and Hugging Face refuses tars whose samples have different members.

A unit is a shard. Its tar, table and offsets are written first, then its marker; the manifest is written last. Workers
also read the captions, to see which shards are up to date, and copy the ledger.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import pyarrow as pa

from capstan.pipeline.config import Resources, fingerprint
from capstan.pipeline.dataset.energon import tar_index
from capstan.pipeline.dataset.indexes import hide_indexes, write_indexes
from capstan.pipeline.dataset.parts import part_columns, parts_in
from capstan.pipeline.dataset.ratios import ratios_of
from capstan.pipeline.dataset.shards import (
    PLACE_COLUMNS,
    Dataset,
    LedgerEntry,
    Manifest,
    Sample,
    ShardEntry,
    read_manifest,
    sha256_of,
    write_manifest,
    write_samples,
)
from capstan.pipeline.errors import DamagedFile, Quarantined, RecipeError
from capstan.pipeline.lease import lease
from capstan.pipeline.pack.job import sample_fields, unlisted
from capstan.pipeline.records import CRC32, FORMAT_VERSION
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units import Job, Piece, Unit, report, results, run
from capstan.recaption import store

SECTION: Final = "captions"  # of the manifest's recipe, in exported datasets only
ORIGINAL: Final = "original"
_TOGETHER: Final = 16  # shards or ledger tables that one worker reads
_STARTED: Final = "state/export/begun.json"  # written first: marks the folder as an export


class Export(Job):
    """The job that writes shards with other captions. A unit is a shard."""

    name = title = "export"

    def __init__(self, dataset: Dataset, layer: str, slot: str, target: Storage) -> None:
        self.dataset, self.layer, self.slot, self.storage = dataset, layer, slot, target
        self.covering = store.model_layer(dataset.storage, layer)  # layers that people wrote may be partial

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"dataset": self.dataset.part()}  # a unit has the entry of its shard

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Write the shard; yield one piece: its manifest entry and the number of samples with a text of the layer."""
        name = unit.spec["shard"]
        dataset = self.dataset.part(unit.spec["entry"])
        table = dataset.table(name)
        if self.covering is not None:
            self._check(self.covering, name, table)
        texts = store.read_layer(self.dataset.storage, self.layer, name, table)
        rows = [self._row(row, texts.get(row["key"], {})) for row in table.to_pylist()]
        digest = hashlib.sha256()
        with scratch() as folder:
            tar = folder / "shard.tar"
            places = write_samples(tar, self._samples(dataset.read_samples(name), rows), digest)
            size = tar.stat().st_size
            parts = parts_in(table.column_names)
            moved = part_columns([place.parts for place in places], parts)
            placed = [
                row | {column: getattr(place, column) for column in PLACE_COLUMNS}
                for row, place in zip(rows, places, strict=True)
            ]
            table = pa.Table.from_pylist(placed, _with_crc32(table.schema))
            for column, values in moved.items():
                table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), values)
            data = parquet_bytes(table)
            entry = ShardEntry(
                name=name,
                samples=len(rows),
                bytes=size,
                sha256=digest.hexdigest(),
                table_sha256=sha256_of(data),
                ratios=ratios_of(table),
            )
            self.storage.put(tar, entry.tar)
            self.storage.write(entry.table, data)
            self.storage.write(entry.index, tar_index(table))
        yield {"entry": entry.model_dump(), "texts": sum(self.slot in texts.get(row["key"], {}) for row in rows)}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts

    def _row(self, row: dict[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
        """Return a sample's row with its new caption."""
        captions = {"layer": self.layer, "slot": self.slot, "captions": {**texts, ORIGINAL: row["caption"]}}
        extra = json.loads(row["extra"]) | {"capstan": captions}
        text = json.dumps(extra, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        return row | {"caption": texts.get(self.slot, row["caption"]), "extra": text}

    def _check(self, layer: str, shard: str, table: pa.Table) -> None:
        """Raise RecipeError if the shard has images that the model's layer does not cover."""
        seen = store.pairs(store.read_rows(self.dataset.storage, layer, shard, ["key", "sha256"]))
        if unseen := store.pairs(table) - seen:
            problem = f"layer {layer} has no captions for {len(unseen):,} newer sample(s) of {shard}"
            raise RecipeError("LAYER", problem, "complete it with `capstan recaption`")

    @staticmethod
    def _samples(
        samples: Iterator[tuple[str, bytes, dict[str, bytes]]], rows: list[dict[str, Any]]
    ) -> Iterator[Sample]:
        for row, (key, jpeg, parts) in zip(rows, samples, strict=True):
            assert key == row["key"]
            report({"samples": 1, "bytes": len(jpeg)})
            yield Sample(key, jpeg, sample_fields(row), row["caption"], parts)


def _with_crc32(schema: pa.Schema) -> pa.Schema:
    """Return a shard table's schema, its scores included, with the checksums that older tables lack."""
    return schema if CRC32.name in schema.names else schema.append(CRC32)


def export(
    source: Storage, layer: str, target: Storage, *, slot: str, resources: Resources, progress: bool = True
) -> dict[str, Any]:
    """Write or complete the copy and return its summary. Shards that are already up to date are not rewritten.

    Raises RecipeError if the layer or slot does not exist, or if `target` holds something else; CapstanError if another
    process writes there.
    """
    dataset, known = Dataset(source), store.layer_recipe(source, layer)
    if slot not in known["slots"]:
        raise RecipeError("--slot", f"layer {layer} has no slot {slot!r}", f"use one of {', '.join(known['slots'])}")
    if not dataset.manifest.complete:
        raise RecipeError(source.field, f"{source.url} is incomplete", "run `capstan build` again")
    recipe = dataset.manifest.recipe | {SECTION: {"layer": layer, "slot": slot}}
    before = _check_target(source, target)
    if before is None and not target.exists(_STARTED):  # another process may be exporting
        target.write(_STARTED, json.dumps(recipe[SECTION]).encode() + b"\n")
    with lease(target, "captions export"):
        return _export(Export(dataset, layer, slot, target), recipe, before, resources, progress)


def _export(
    job: Export, recipe: dict[str, Any], before: Manifest | None, resources: Resources, progress: bool
) -> dict[str, Any]:
    dataset, target = job.dataset, job.storage
    units = _units(job, resources, progress)
    wanted, done = {unit.id for unit in units}, job.markers.read()
    if before is not None:
        kept = [ShardEntry(**done[unit.id]["entry"]) for unit in units if unit.id in done]
        write_manifest(target, Manifest(recipe=recipe, complete=False, shards=kept))
    hide_indexes(target)
    job.markers.forget(done.keys() - wanted)
    _copy_ledger(job, before, resources, progress)
    summary = run(job, units, resources, progress=progress)
    done = job.markers.read()
    manifest = dataset.manifest.model_copy(
        update={
            "recipe": recipe,
            "recipe_hash": fingerprint(recipe),
            "selection": "",
            "complete": not summary.quarantined,
            "shards": [ShardEntry(**done[unit.id]["entry"]) for unit in units if unit.id in done],
        }
    )
    manifest = manifest.model_copy(update={"indexes": write_indexes(target, manifest)})
    target.delete(*unlisted(target, manifest))
    write_manifest(target, manifest)
    if summary.quarantined:
        raise Quarantined(job.name, summary.quarantined)
    samples, texts = (sum(entry.samples for entry in manifest.shards), int(sum(f["texts"] for f in done.values())))
    return {
        "dataset": target.url,
        "layer": job.layer,
        "slot": job.slot,
        "shards": len(manifest.shards),
        "samples": samples,
        "from_layer": texts,
        "original": samples - texts,
        "written": summary.done,
    }


def _check_target(source: Storage, target: Storage) -> Manifest | None:
    """Return the manifest of an existing export, if any. Raises RecipeError if the target holds something else."""
    if source.url == target.url or (source.local_path() and source.local_path() == target.local_path()):
        raise RecipeError(
            target.field, "is the dataset itself", "choose another folder: tars are never rewritten in place"
        )
    before = read_manifest(target)
    if before is not None and SECTION not in before.recipe:
        raise RecipeError(target.field, f"{target.url} holds another dataset", "choose an empty folder")
    if before is None and not target.names("state/export") and (other := target.names()):
        problem = f"{target.url} holds other files, e.g. {other[0]}"
        raise RecipeError(target.field, problem, "choose an empty folder, or an earlier export")
    return before


# On workers, before and next to the shards ---------------------------------------------------------------------------


class Fingerprints(Job):
    """The job that reads the captions of some shards. A unit is a few shards.

    Its markers hold a hash of each shard's captions; None for a shard that a model has not captioned.
    """

    name, title = "export-captions", "export: captions"

    def __init__(self, dataset: Dataset, layer: str, target: Storage) -> None:
        self.dataset, self.layer, self.storage = dataset.part(), layer, target

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        source = self.dataset.storage
        found = [
            fingerprint(store.read_layer(source, self.layer, shard))
            if store.is_captioned(source, self.layer, shard)
            else None
            for shard in unit.spec["shards"]
        ]
        yield {"captions": found}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts


class CopyLedger(Fingerprints):
    """The job that copies ledger tables. A unit is a few tables."""

    name, title = "export-ledger", "export: ledger"

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        for entry in (LedgerEntry(**fields) for fields in unit.spec["tables"]):
            data = self.dataset.storage.read(entry.table)
            if sha256_of(data) != entry.sha256:
                raise DamagedFile(self.dataset.storage.path(entry.table), "its SHA-256 is not that of what was written")
            self.storage.write(entry.table, data)
        yield {"tables": len(unit.spec["tables"])}


def _units(job: Export, resources: Resources, progress: bool) -> list[Unit]:
    """Return one unit per shard; its id includes a hash of everything that determines its bytes."""
    entries = job.dataset.manifest.shards
    work = [Unit(part[0].name, {"shards": [entry.name for entry in part]}) for part in _parts(entries)]
    done = results(Fingerprints(job.dataset, job.layer, job.storage), work, resources, progress=progress)
    captions = [found for facts in done for found in facts["captions"]]
    lacking = [entry.name for entry, found in zip(entries, captions, strict=True) if found is None]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        problem = f"layer {job.layer} has no captions for {lacking[0]}{more}"
        raise RecipeError("LAYER", problem, "complete it with `capstan recaption`")
    return [
        Unit(
            f"{entry.name}-{fingerprint([FORMAT_VERSION, entry.sha256, found, job.layer, job.slot])}",
            {"shard": entry.name, "rows": entry.samples, "entry": entry.model_dump()},
        )
        for entry, found in zip(entries, captions, strict=True)
    ]


def _copy_ledger(job: Export, before: Manifest | None, resources: Resources, progress: bool) -> None:
    """Copy the ledger tables that an earlier export has not copied as they are."""
    known = {entry for entry in before.ledger if before.complete} if before is not None else set()
    present = set(job.storage.names("ledger")) if known else set()
    tables = [entry for entry in job.dataset.manifest.ledger if entry not in known or entry.table not in present]
    work = [Unit(part[0].name, {"tables": [entry.model_dump() for entry in part]}) for part in _parts(tables)]
    results(CopyLedger(job.dataset, job.layer, job.storage), work, resources, progress=progress)


E = TypeVar("E")


def _parts(items: Sequence[E]) -> list[Sequence[E]]:
    return [items[start : start + _TOGETHER] for start in range(0, len(items), _TOGETHER)]
