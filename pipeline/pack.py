"""Decisions and staged pictures → the dataset: ledger, shards, indexes, and the manifest last.

A shard is named by its place, its marker by its place and content: a shard whose content stays is never packed again.
Where shards change, a manifest without them is published first, so that at no moment a reader is shown a shard that is
being replaced:

    manifest without what changes → indexes and old markers gone → ledger → shards → indexes → stale files gone →
    manifest
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.blocklist import blocked
from pipeline.config import Recipe, fingerprint
from pipeline.energon import tar_index
from pipeline.indexes import hide_indexes, write_indexes
from pipeline.ingest import Staged
from pipeline.local import scratch
from pipeline.records import FORMAT_VERSION, LEDGER_SCHEMA, SHARD_SCHEMA
from pipeline.repeats import evaluation_signature
from pipeline.select import Decisions, shard_name
from pipeline.shards import (
    LedgerEntry,
    Manifest,
    Place,
    Sample,
    ShardEntry,
    read_manifest,
    sha256_of,
    write_manifest,
    write_samples,
)
from pipeline.storage import Storage, parquet_bytes
from pipeline.units import Job, Piece, Summary, Unit, forget, markers, report, run

log = logging.getLogger(__name__)

# The recipe's sections that decide what is in a dataset.
_SECTIONS = {"source", "fetch", "image", "select", "dedup", "blocklist", "shards", "unit"}


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a unit; the shard's samples are those of them that the ledger puts in it."""

    unit: str
    table: str
    tar: str
    start: int
    stop: int


class Pack(Job):
    """Writes shards/<name>.tar, .parquet and .tar.idx from staged pictures. A unit is a shard."""

    name = title = "pack"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """One piece: the shard's entry in the manifest."""
        name = unit.spec["shard"]
        segments = [Segment(**segment) for segment in unit.spec["segments"]]
        parts = [self._rows(segment, name) for segment in segments]
        digest = hashlib.sha256()
        with scratch() as folder:
            tar = folder / "shard.tar"
            places = write_samples(tar, self._samples(segments, parts), digest)
            size = tar.stat().st_size
            rows = _table(parts, places)
            table = parquet_bytes(rows)
            entry = ShardEntry(
                name=name,
                samples=len(places),
                bytes=size,
                sha256=digest.hexdigest(),
                table_sha256=sha256_of(table),
            )
            self.storage.put(tar, entry.tar)
            self.storage.write(entry.table, table)
            self.storage.write(entry.index, tar_index(rows))
        yield entry.model_dump()

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (entry,) = pieces
        return entry

    def _rows(self, segment: Segment, shard: str) -> pa.Table:
        """The segment's samples: the ledger's columns, and offset and size in the staged tar."""
        ledger = self.storage.read_table(ledger_entry_name(segment.unit))
        spans = self.storage.read_table(segment.table, ["offset", "size"])
        rows = ledger.append_column("offset", spans["offset"]).append_column("size", spans["size"])
        rows = rows.slice(segment.start, segment.stop - segment.start)
        return rows.filter(pc.equal(rows["shard"], shard))

    def _samples(self, segments: list[Segment], parts: list[pa.Table]) -> Iterator[Sample]:
        for segment, rows in zip(segments, parts, strict=True):
            with self.storage.open(segment.tar) as tar:
                for row in rows.to_pylist():
                    tar.seek(row["offset"])
                    jpeg = tar.read(row["size"])
                    report({"samples": 1, "bytes": len(jpeg)})
                    yield Sample(row["key"], jpeg, sample_fields(row), row["caption"])


def sample_fields(row: Mapping[str, Any]) -> dict[str, str | int]:
    """KEY.json: the same keys for every sample, no nulls. `phash` is hexadecimal, as it exceeds signed 64 bits;
    `extra` is JSON text, as the source's columns may be null or change their type from row to row."""
    names = ["key", "url", "caption", "width", "height", "original_width", "original_height", "sha256"]
    return {name: row[name] for name in names} | {"phash": f"{row['phash']:016x}", "extra": row["extra"]}


def _table(parts: list[pa.Table], places: list[Place]) -> pa.Table:
    """The shard's table: the samples' rows with where they lie in the shard."""
    rows = pa.concat_tables(parts).drop_columns(["offset", "size"])
    for name, values in zip(Place._fields, zip(*places, strict=True), strict=True):
        rows = rows.append_column(name, pa.array(values, pa.int64()))
    return rows.select(SHARD_SCHEMA.names).cast(SHARD_SCHEMA)


def ledger_entry_name(unit: str) -> str:
    return f"ledger/unit-{unit}.parquet"


def selection_of(recipe: Recipe, storage: Storage, units: Sequence[Staged]) -> str:
    """Changes with anything that decides which rows are kept, in which shard, and what is staged of them."""
    settings = recipe.model_dump(mode="json", include={"select", "dedup", "shards", "image"})
    outside = [blocked(recipe, storage).digest, evaluation_signature(recipe)]
    return fingerprint([FORMAT_VERSION, settings, outside, [unit.table for unit in units]])


def content_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as the manifest tells it: without how the source is reached, which may hold secrets."""
    content = recipe.model_dump(mode="json", include=_SECTIONS)
    (content["source"] or {}).pop("storage", None)
    return content


def pack(recipe: Recipe, storage: Storage, decisions: Decisions, *, progress: bool = True) -> tuple[Manifest, Summary]:
    """Publish what was decided. Shards that cannot be packed are left out of the manifest, which is then incomplete."""
    job = Pack(storage)
    units = _shard_units(recipe, decisions)
    wanted = {unit.id for unit in units}
    done = markers(job)
    content = content_recipe(recipe)
    manifest = Manifest(recipe=content, recipe_hash=fingerprint(content), complete=False)
    if not units:
        log.warning("pack: no row is kept, so there is no shard (%s)", _where_they_went(decisions))
    if read_manifest(storage) is not None:
        unchanged = [ShardEntry(**done[unit.id]) for unit in units if unit.id in done]
        write_manifest(storage, manifest.model_copy(update={"shards": unchanged}))
    hide_indexes(storage)
    forget(job, done.keys() - wanted)
    ledger = _write_ledger(storage, decisions)
    summary = run(job, units, recipe.resources, progress=progress)
    done = markers(job)
    manifest = manifest.model_copy(
        update={
            "selection": selection_of(recipe, storage, decisions.units),
            "complete": not summary.quarantined,
            "counts": decisions.counts,
            "funnel": decisions.funnel,
            "shards": [ShardEntry(**done[unit.id]) for unit in units if unit.id in done],
            "ledger": ledger,
        }
    )
    manifest = manifest.model_copy(update={"indexes": write_indexes(storage, manifest)})
    for name in unlisted(storage, manifest):
        storage.delete(name)
    write_manifest(storage, manifest)
    return manifest, summary


def unlisted(storage: Storage, manifest: Manifest) -> list[str]:
    """Files in shards/ and ledger/ that `manifest` does not list."""
    listed = {name for entry in manifest.shards for name in (entry.tar, entry.table, entry.index)}
    listed |= {entry.table for entry in manifest.ledger} | set(manifest.indexes)
    return [name for folder in ("shards", "ledger") for name in storage.names(folder) if name not in listed]


def _where_they_went(decisions: Decisions) -> str:
    """The selection's steps that took rows, in order."""
    lost = [f"{step['step']} took {step['lost']:,}" for step in decisions.funnel if step["lost"]]
    return f"of {len(decisions.step):,} rows " + ", ".join(lost) if lost else "the source has no rows"


def _shard_units(recipe: Recipe, decisions: Decisions) -> list[Unit]:
    """One unit a shard; its id has the hash of all that decides its bytes."""
    order = np.argsort(decisions.shard, kind="stable")
    bounds = np.searchsorted(decisions.shard[order], np.arange(decisions.shard.max(initial=-1) + 2))
    units = []
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        rows = order[first:last]
        if not len(rows):  # all that it held was taken down
            continue
        keys = decisions.key.take(pa.array(rows)).to_pylist()
        shas = decisions.sha256.take(pa.array(rows)).to_pylist()
        image = recipe.image.model_dump(mode="json")
        content = fingerprint([FORMAT_VERSION, image, keys, shas])
        segments = _segments(decisions, int(rows[0]), int(rows[-1]) + 1)
        name = shard_name(number)
        units.append(Unit(f"{name}-{content}", {"shard": name, "segments": segments, "rows": len(rows)}))
    return units


def _segments(decisions: Decisions, first: int, last: int) -> list[dict[str, Any]]:
    """Rows [first, last) of all rows, as row ranges of units."""
    starts = decisions.starts
    return [
        {"unit": unit.unit, "table": unit.table, "tar": unit.tar, "start": max(first - a, 0), "stop": min(last, b) - a}
        for unit, a, b in zip(decisions.units, starts, starts[1:], strict=False)
        if a < last and b > first and unit.tar
    ]


def _write_ledger(storage: Storage, decisions: Decisions) -> list[LedgerEntry]:
    """ledger/unit-*.parquet: one row for every input row, its outcome final."""
    entries = []
    starts = decisions.starts
    for unit, start, stop in zip(decisions.units, starts, starts[1:], strict=False):
        rows = storage.read_table(unit.table)
        columns = {name: rows[name] for name in LEDGER_SCHEMA.names if name in rows.column_names}
        columns |= decisions.columns(start, stop, rows["reason"], rows["detail"])
        table = pa.table({name: columns[name] for name in LEDGER_SCHEMA.names}, schema=LEDGER_SCHEMA)
        data = parquet_bytes(table)
        storage.write(ledger_entry_name(unit.unit), data)
        entries.append(LedgerEntry(name=f"unit-{unit.unit}", rows=len(table), sha256=sha256_of(data)))
    return entries
