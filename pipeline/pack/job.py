"""Decisions and staged images → ledger, shards, indexes, and the manifest last

A shard is named by its number, its marker by number and content hash: a shard whose content is unchanged is never
packed again. When shards change, a manifest without them is published first, so that a reader never sees a shard
that is being replaced:

    manifest without changed shards → delete indexes and old markers → ledger → shards → indexes → delete stale files →
    manifest
"""

from __future__ import annotations

import bisect
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.dataset.energon import tar_index
from capstan.pipeline.dataset.indexes import hide_indexes, write_indexes
from capstan.pipeline.dataset.parts import part_columns, part_fields, part_names
from capstan.pipeline.dataset.ratios import ratios_of
from capstan.pipeline.dataset.shards import (
    PLACE_COLUMNS,
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
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.ingest.staging import Packed, free, samples
from capstan.pipeline.pack.carryover import carry_over, clear
from capstan.pipeline.pack.ledger import WriteLedger, ledger_name
from capstan.pipeline.records import CRC32, FORMAT_VERSION, KEPT, LEDGER_SCHEMA, SHARD_SCHEMA, with_scores
from capstan.pipeline.score.scorer import Scorer
from capstan.pipeline.score.store import pins
from capstan.pipeline.select.arrays.large_arrays import release
from capstan.pipeline.select.decide import Decided, Decisions, shard_name, shard_rows
from capstan.pipeline.select.dedup import evaluation_signature
from capstan.pipeline.select.derived import CLIP_FACTS, identity, parts_of
from capstan.pipeline.select.licenses import LICENSE
from capstan.pipeline.select.pairs import pairs_signature
from capstan.pipeline.select.review import reviews_signature
from capstan.pipeline.source.blocklist import blocked
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units import Job, Piece, Summary, Unit, report, run

log = logging.getLogger(__name__)

_ROW = "row"  # a row's place in its unit

# The sections of the recipe that determine the content of a dataset.
_SECTIONS = {"source", "fetch", "image", "score", "select", "dedup", "blocklist", "shards", "unit"}


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a unit. The shard's samples are the ones that the ledger assigns to it."""

    unit: str
    table: str
    tar: str
    start: int
    stop: int


class Pack(Job):
    """The job that writes shards/<name>.tar, .parquet and .tar.idx from staged images. A unit is a shard."""

    name = title = "pack"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Yield one piece: the shard's manifest entry."""
        name = unit.spec["shard"]
        segments = [Segment(**segment) for segment in unit.spec["segments"]]
        parts = [self._rows(segment, name) for segment in segments]
        if "packed" in unit.spec:
            yield self._rewrite_table(ShardEntry(**unit.spec["packed"]), parts).model_dump()
            return
        digest = hashlib.sha256()
        with scratch() as folder:
            tar = folder / "shard.tar"
            shelf = [(tar_name, table_name) for tar_name, table_name in unit.spec["shelf"]]
            places = write_samples(tar, self._samples(segments, parts, shelf), digest)
            size = tar.stat().st_size
            rows = _table(parts, places, unit.spec.get("parts", []))
            table = parquet_bytes(rows)
            entry = ShardEntry(
                name=name,
                samples=len(places),
                bytes=size,
                sha256=digest.hexdigest(),
                table_sha256=sha256_of(table),
                ratios=ratios_of(rows),
            )
            self.storage.put(tar, entry.tar)
            self.storage.write(entry.table, table)
            self.storage.write(entry.index, tar_index(rows))
        yield entry.model_dump()

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (entry,) = pieces
        return {**entry, "scores": unit.spec["scores"]}

    def _rows(self, segment: Segment, shard: str) -> pa.Table:
        """Return the segment's samples: the ledger's columns, and their row number in the unit."""
        ledger = self.storage.read_table(ledger_name(segment.unit))
        rows = ledger.append_column(_ROW, pa.array(np.arange(len(ledger))))
        rows = rows.slice(segment.start, segment.stop - segment.start)
        return rows.filter(pc.equal(rows["shard"], shard))

    def _samples(self, segments: list[Segment], parts: list[pa.Table], shelf: list[Packed]) -> Iterator[Sample]:
        bad = list[str]()
        for segment, rows in zip(segments, parts, strict=True):
            found = samples(
                self.storage, segment.table, segment.tar, rows[_ROW].to_pylist(), shelf, damaged_is_none=True
            )
            for row, (_, stored) in zip(rows.to_pylist(), found, strict=True):
                if stored is None:  # all damage is noted before the shard fails, so that one more build repairs it
                    bad.append(self.storage.path(segment.tar or segment.table))
                    continue
                report({"samples": 1, "bytes": len(stored.jpeg) + sum(map(len, stored.parts.values()))})
                yield Sample(row["key"], stored.jpeg, sample_fields(row), row["caption"], stored.parts)
        if bad:
            raise DamagedFile(bad[0], f"{len(bad)} images of the shard are not what was staged")

    def _rewrite_table(self, packed: ShardEntry, parts: list[pa.Table]) -> ShardEntry:
        """Rewrite the shard's table with its new scores; the tar is unchanged."""
        before = self.storage.read_table(packed.table)
        if CRC32.name not in before.column_names:
            before = before.append_column(CRC32, pa.nulls(len(before), CRC32.type))
        columns = [before[name].to_pylist() for name in PLACE_COLUMNS]
        places = [Place(*values) for values in zip(*columns, strict=True)]
        rows = _table(parts, places)
        for name in part_names(before.column_names):
            rows = rows.append_column(before.schema.field(name), before[name])
        assert rows["key"].equals(before["key"]), f"{packed.table} is of another shard"
        table = parquet_bytes(rows)
        self.storage.write(packed.table, table)
        return packed.model_copy(update={"table_sha256": sha256_of(table), "ratios": ratios_of(rows)})


def sample_fields(row: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Return the content of KEY.json: the same keys for every sample, and no nulls.

    `phash` is hexadecimal, since it exceeds signed 64 bits. `extra` is JSON text, since the source's columns may be
    null or change their type from row to row. `license` and the facts of clips are there if the dataset has these
    columns.
    """
    names = ["key", "url", "caption", "width", "height", "original_width", "original_height", "sha256"]
    more = {field.name: row[field.name] for field in (LICENSE, *CLIP_FACTS) if field.name in row}
    return {name: row[name] for name in names} | {"phash": f"{row['phash']:016x}", "extra": row["extra"], **more}


def _table(parts: list[pa.Table], places: list[Place], suffixes: Sequence[str] = ()) -> pa.Table:
    """Return the shard's table: the samples' rows, their offsets in the tar, and those of the parts `suffixes`."""
    rows = pa.concat_tables(parts)
    scores = [field for field in rows.schema if field.name not in (*LEDGER_SCHEMA.names, _ROW)]
    for name in PLACE_COLUMNS:
        rows = rows.append_column(name, pa.array([getattr(place, name) for place in places], pa.int64()))
    schema = with_scores(SHARD_SCHEMA, scores, rows.schema.metadata)
    rows = rows.select(schema.names).cast(schema)
    for field, column in zip(
        part_fields(suffixes), part_columns([place.parts for place in places], suffixes).values(), strict=True
    ):
        rows = rows.append_column(field, column)
    return rows


def selection_of(recipe: Recipe, storage: Storage, units: Sequence[Staged]) -> str:
    """Return a hash of everything that determines which rows are kept, in which shard, and what is staged."""
    settings = recipe.model_dump(mode="json", include={"select", "dedup", "shards", "image"})
    outside = [blocked(recipe, storage).digest, evaluation_signature(recipe)]
    if any(step.review is not None for step in recipe.select):
        outside.append(reviews_signature(recipe, storage))
    if different := pairs_signature(storage):
        outside.append(different)
    outside += identity(recipe)
    return fingerprint(
        [FORMAT_VERSION, settings, outside, [[unit.table, *dict(unit.scores).values()] for unit in units]]
    )


def content_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as the manifest stores it: without the source's storage options, which may hold secrets."""
    content = recipe.model_dump(mode="json", include=_SECTIONS)
    (content["source"] or {}).pop("storage", None)
    return content


def is_current(manifest: Manifest | None, recipe: Recipe, storage: Storage, units: Sequence[Staged]) -> bool:
    """Return whether the dataset is complete and as the recipe selects the units' rows."""
    if manifest is None:
        return False
    same_recipe = manifest.recipe_hash == fingerprint(content_recipe(recipe))
    return manifest.complete and same_recipe and manifest.selection == selection_of(recipe, storage, units)


def pack(
    recipe: Recipe,
    storage: Storage,
    decisions: Decisions,
    scorers: Sequence[Scorer] = (),
    *,
    progress: bool = True,
) -> tuple[Manifest, Summary]:
    """Publish the dataset as decided. Shards that cannot be packed are left out of the manifest, which is then
    incomplete.

    Raises RecipeError if images that should be packed no longer exist.
    """
    counts = decisions.counts
    if not counts[KEPT]:
        log.warning("pack: no row is kept, so there is no shard (%s)", _losses(decisions))
    result = Manifest(counts=counts, funnel=decisions.funnel)
    return pack_part(recipe, storage, decisions, decisions.units, result, scorers, progress=progress)


def pack_part(
    recipe: Recipe,
    storage: Storage,
    decisions: Decided,
    staged: Sequence[Staged],
    result: Manifest,
    scorers: Sequence[Scorer] = (),
    *,
    progress: bool = True,
) -> tuple[Manifest, Summary]:
    """Publish a part of the dataset as decided, and leave the rest.

    `decisions` are those on the rows of some units and of all their shards, `staged` are all units. `result` has the
    whole dataset's counts and funnel, and the shards and ledger tables that stay as they are.
    """
    job, pinned, before = Pack(storage), pins(scorers), read_manifest(storage)
    ledger = WriteLedger(recipe, storage, pinned)
    others = {entry.name for entry in result.shards}
    units, marks = _shard_units(recipe, decisions, pinned), job.markers.read()
    wanted, done = {unit.id for unit in units}, {id_: m for id_, m in marks.items() if m["name"] not in others}
    part = before and before.model_copy(update={"shards": [one for one in before.shards if one.name not in others]})
    shelf = carry_over(storage, part, decisions, [unit.spec["shard"] for unit in units if unit.id not in done])
    content = content_recipe(recipe)
    manifest = Manifest(recipe=content, recipe_hash=fingerprint(content), complete=False, scores=pinned)
    changed = {
        unit.id for unit in units if done.get(unit.id, {}).get("scores", "") != unit.spec["scores"]
    } & done.keys()
    if before is not None:
        unchanged = [ShardEntry(**done[unit.id]) for unit in units if unit.id in done and unit.id not in changed]
        write_manifest(storage, manifest.model_copy(update={"shards": _in_order([*result.shards, *unchanged])}))
    tables = ledger.units(decisions)
    _forget_changed(job, ledger, tables, result, done.keys() - wanted, {unit: done[unit] for unit in changed})
    summary = run(ledger, ledger.handed_over(tables, decisions), recipe.resources, progress=progress)
    ledger.forget()
    if not summary.quarantined:  # a shard takes its rows from the ledger
        work = [_with_sources(unit, shelf, done[unit.id] if unit.id in changed else None) for unit in units]
        summary = run(job, work, recipe.resources, redo=changed, progress=progress)
    done = job.markers.read()
    listed = [done[unit.id] for unit in units if done.get(unit.id, {}).get("scores") == unit.spec["scores"]]
    manifest = manifest.model_copy(
        update={
            "selection": selection_of(recipe, storage, staged),
            "complete": not summary.quarantined,
            "counts": result.counts,
            "funnel": result.funnel,
            "shards": _in_order([*result.shards, *(ShardEntry(**entry) for entry in listed)]),
            "ledger": _in_order([*result.ledger, *ledger.entries(tables)]),
            "licenses": ledger.licenses(),
        }
    )
    manifest = manifest.model_copy(update={"indexes": write_indexes(storage, manifest)})
    for name in unlisted(storage, manifest):
        storage.delete(name)
    write_manifest(storage, manifest)
    if manifest.complete:
        clear(storage)
        if not recipe.keep_staged:
            free(storage, staged)
    return manifest, summary


def _forget_changed(
    job: Pack,
    ledger: WriteLedger,
    tables: list[Unit],
    result: Manifest,
    stale: Iterable[str],
    changed: Mapping[str, Mapping[str, Any]],
) -> None:
    """Hide the indexes, and forget what will be replaced: markers of `stale` shards, and of ledger tables.

    `changed` are the markers of shards whose table alone is rewritten.
    """
    hide_indexes(job.storage)
    job.markers.forget(stale)
    for unit, facts in changed.items():  # its table may be the old one or the new one from here on
        job.markers.mark(unit, {**facts, "scores": "?"})
    ledger.forget_stale(tables, {entry.name for entry in result.ledger})


E = TypeVar("E", ShardEntry, LedgerEntry)


def _in_order(entries: Iterable[E]) -> list[E]:
    """Return entries of shards or of ledger tables by the numbers in their names."""
    return sorted(entries, key=lambda entry: [int(number) for number in re.findall(r"\d+", entry.name)])


def _with_sources(unit: Unit, shelf: Mapping[str, list[Packed]], packed: Mapping[str, Any] | None) -> Unit:
    """Return a shard's unit with the copies that hold its images, and its entry if only its table is `packed` again."""
    more = {} if packed is None else {"packed": packed}
    return Unit(unit.id, {**unit.spec, "shelf": shelf.get(unit.spec["shard"], []), **more})


def unlisted(storage: Storage, manifest: Manifest) -> list[str]:
    """Return the files in shards/ and ledger/ that `manifest` does not list."""
    listed = {name for entry in manifest.shards for name in (entry.tar, entry.table, entry.index)}
    listed |= {entry.table for entry in manifest.ledger} | set(manifest.indexes)
    return [name for folder in ("shards", "ledger") for name in storage.names(folder) if name not in listed]


def _losses(decisions: Decisions) -> str:
    """Return the selection's steps that dropped rows, in order, as text."""
    lost = [f"{step['step']} dropped {step['lost']:,}" for step in decisions.funnel if step["lost"]]
    return f"of {len(decisions.step):,} rows " + ", ".join(lost) if lost else "the source has no rows"


def _shard_units(recipe: Recipe, decisions: Decided, pinned: list[dict[str, Any]]) -> list[Unit]:
    """Return one unit per shard. Its id includes a hash of everything that determines the tar's bytes; `scores` is a
    hash of everything else in the table.
    """
    units, starts = [], decisions.starts
    for number, (first, last) in shard_rows(decisions.shard).items():
        rows = first + np.flatnonzero(decisions.shard[first : last + 1] == number)
        image = recipe.image.model_dump(mode="json")
        facts = [image, decisions.keys(rows), decisions.hashes(rows), *identity(recipe)]
        content = fingerprint([FORMAT_VERSION, *facts])
        segments = _segments(decisions, starts, first, last + 1)
        files = [dict(decisions.units[segment.pop("number")].scores) for segment in segments]
        scores = fingerprint([pinned, files]) if pinned else ""
        name = shard_name(number)
        spec = {"shard": name, "segments": segments, "rows": len(rows), "scores": scores}
        spec |= {"parts": parts_of(recipe)} if parts_of(recipe) else {}
        units.append(Unit(f"{name}-{content}", spec))
    release(decisions.key, decisions.sha256)
    return units


def _segments(decisions: Decided, starts: list[int], first: int, last: int) -> list[dict[str, Any]]:
    """Return rows [first, last) of all rows as row ranges of units; `starts`: each unit's first row, then the end."""
    segments = []
    for number in range(bisect.bisect_right(starts, first) - 1, bisect.bisect_left(starts, last)):
        unit, a, b = decisions.units[number], starts[number], starts[number + 1]
        if b > first and (unit.tar or unit.freed):
            place = {"start": max(first - a, 0), "stop": min(last, b) - a, "number": number}
            segments.append({"unit": unit.unit, "table": unit.table, "tar": unit.tar, **place})
    return segments
