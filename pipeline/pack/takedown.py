"""Takedown: remove rows, their images and texts for good

    find        the rows that are named, and all others that hold the same file (pipeline.pack.named_rows)
    block       add their keys, URLs and sums to the dataset's blocklist (pipeline.source.blocklist)
    scrub       rewrite the plan tables, staged tables and tars, scores, captions and latents that hold them;
                delete reports and caption comparisons
    (select)    pipeline.build repacks the shards, ledger, indexes and manifest that change (pipeline.pack.without)
    finish      bind the latents to the new shards, append to the log

    removed/pending.parquet    the rows being removed; kept until the end, so that an interrupted takedown resumes
    removed/log.jsonl          one line per takedown: date, entries, numbers of rows and shards

A removed row keeps its key, sums and sizes; it is `rejected` with the reason `removed`. A row that was in a shard holds
its place there (see select), so that its neighbours stay in their shards and near copies of it stay out.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline import config
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.parts import part_columns, part_fields, parts_in
from capstan.pipeline.dataset.shards import Place, Sample, read_manifest, sha256_of, write_samples
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.ingest.job import STAGED_SCHEMA
from capstan.pipeline.ingest.references import REFERENCE, without_references
from capstan.pipeline.ingest.staging import samples
from capstan.pipeline.pack import row_lookup
from capstan.pipeline.pack.carryover import clear
from capstan.pipeline.pack.named_rows import SCHEMA, find_rows, ingests
from capstan.pipeline.pack.scrub import scrub_derived, settle_latents
from capstan.pipeline.records import CRC32, REMOVED
from capstan.pipeline.select import column_blocks
from capstan.pipeline.select.conditions import HELD_PLACE
from capstan.pipeline.source.blocklist import (
    FOLDER,
    KINDS,
    Blocklist,
    add_removed,
    read_lists,
    scrub_planned,
)
from capstan.pipeline.source.plan import read_plan
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units import MarkerLog

log = logging.getLogger(__name__)

_PENDING: Final = f"{FOLDER}/pending.parquet"
_LOG: Final = f"{FOLDER}/log.jsonl"


@dataclass(frozen=True)
class Takedown:
    """The rows being removed (SCHEMA), and the numbers of entries of each kind by request."""

    rows: pa.Table
    requests: dict[str, dict[str, int]]

    @property
    def asked(self) -> dict[str, int]:
        """The number of requested entries of each kind."""
        return dict(sum((Counter(counts) for counts in self.requests.values()), Counter()))

    @property
    def keys(self) -> pa.Array:
        return self.rows["key"].combine_chunks()

    @property
    def units(self) -> set[str] | None:
        """The units of the rows; None if an older version wrote down the rows without them."""
        return set(self.rows["unit"].to_pylist()) if "unit" in self.rows.column_names else None

    @property
    def shards(self) -> list[str]:
        """The shards that hold any of the rows."""
        return sorted(set(self.rows["shard"].to_pylist()) - {""})

    @property
    def kept(self) -> pa.Array:
        """Keys of the rows that were in a shard."""
        return self.rows.filter(pc.not_equal(self.rows["shard"], ""))["key"].combine_chunks()


def take_down(storage: Storage, lists: config.Blocklist, *, progress: bool = True) -> Takedown:
    """Scrub the rows that `lists` (files of entries) name. The dataset is complete again after the next select.

    Raises RecipeError for lists that cannot be read or are empty, and if there is no dataset.
    """
    asked = read_lists(lists, lambda kind: f"--{kind}")
    if not asked:
        raise RecipeError("remove", "names no entry", "name a file with --keys, --urls, --domains or --sha256")
    if not (plan := read_plan(storage)).units:
        raise RecipeError(storage.field, f"no dataset at {storage.url}", "name a folder that `capstan build` made")
    before = resume(storage)
    rows = find_rows(storage, plan, asked, progress)
    requests = {_request_id(asked): {kind: len(getattr(asked, kind)) for kind in KINDS if getattr(asked, kind)}}
    schema = SCHEMA
    if before is not None:  # an interrupted takedown, perhaps of the same entries: both end together
        rows, requests = before.rows.to_pylist() + rows, before.requests | requests
        schema = SCHEMA if before.units is not None else before.rows.schema
    rows_left = pa.Table.from_pylist(rows, schema).replace_schema_metadata({"requests": json.dumps(requests)})
    # The blocklist comes first: a build in between must not bring these rows back.
    add_removed(storage, asked)
    storage.write_table(_PENDING, rows_left)
    takedown = resume(storage)
    assert takedown is not None
    return takedown


def resume(storage: Storage) -> Takedown | None:
    """Scrub the rows of a pending takedown, if there is one, and return it."""
    takedown = pending(storage)
    if takedown is None:
        return None
    columns = {kind: frozenset(takedown.rows[name].to_pylist()) - {""} for kind, name in _BLOCKS.items()}
    add_removed(storage, Blocklist(**columns))
    if len(takedown.rows):
        units, renamed = takedown.units, dict[str, str]()
        for unit in read_plan(storage).units:
            if units is None or unit.id in units:
                _scrub_plan(storage, unit.table, takedown.keys)
        for markers in ingests(storage):
            for unit_id, facts in markers.read().items():
                if units is None or unit_id in units:
                    renamed[facts["table"]] = _scrub_staged(markers, unit_id, facts, takedown)
        row_lookup.follow(storage, renamed)
        column_blocks.forget(storage, units)
        scrub_derived(storage, takedown.keys, takedown.shards, _packed(storage))
        _sweep(storage)
    return takedown


_BLOCKS: Final = {"keys": "key", "sha256": "sha256", "urls": "url"}


def finish(storage: Storage) -> None:
    """End the pending takedown, if there is one, and append it to the log. Call it once the dataset is complete."""
    takedown = pending(storage)
    if takedown is None:
        return
    settle_latents(storage, read_manifest(storage), takedown.shards)
    clear(storage)  # packing may have been interrupted just before it did this
    line = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "asked": takedown.asked,
        "rows": len(takedown.rows),
        "kept": len(takedown.kept),
        "shards": takedown.shards,
    }
    before = storage.read(_LOG) if storage.exists(_LOG) else b""
    storage.write(_LOG, before + json.dumps(line).encode() + b"\n")
    storage.delete(_PENDING)


def recipe_of(storage: Storage) -> Recipe | None:
    """Return the recipe stored in the dataset's manifest, or None if it was never packed."""
    manifest = read_manifest(storage)
    if manifest is None:
        return None
    return config.validate(Recipe, {"dataset": storage.url, "storage": storage.options, **manifest.recipe})


def pending(storage: Storage) -> Takedown | None:
    """Return the takedown that was interrupted, if there is one."""
    if not storage.exists(_PENDING):
        return None
    try:
        rows = storage.read_table(_PENDING)
    except DamagedFile as error:
        hint = "remove this file, and run the same `capstan remove` again"
        raise DamagedFile(error.file, error.problem, hint) from None
    known: dict[bytes, bytes] = rows.schema.metadata
    # Pending since before requests were told apart: they are one.
    requests = json.loads(known[b"requests"]) if b"requests" in known else {"": json.loads(known[b"asked"])}
    return Takedown(rows, requests)


def _request_id(asked: Blocklist) -> str:
    return config.fingerprint({kind: sorted(getattr(asked, kind)) for kind in KINDS})


def _packed(storage: Storage) -> set[tuple[str, str]]:
    """Return (name, sum) of all present shards, including those that no manifest lists during repacking."""
    manifest = read_manifest(storage)
    listed = {(entry.name, entry.sha256) for entry in (manifest.shards if manifest else [])}
    return listed | {(facts["name"], facts["sha256"]) for facts in MarkerLog(storage, "pack").read().values()}


# Scrubbing -----------------------------------------------------------------------------------------------------------


def _scrub_plan(storage: Storage, name: str, keys: pa.Array) -> None:
    here = pc.is_in(storage.read_table(name, ["key"])["key"], keys)
    if not pc.any(here).as_py():
        return
    table = storage.read_table(name)
    if pc.any(pc.and_(here, pc.not_equal(table["hash"], REMOVED))).as_py():
        storage.write_table(name, scrub_planned(table, here.to_pylist()))


def _scrub_staged(markers: MarkerLog, unit: str, facts: Mapping[str, Any], takedown: Takedown) -> str:
    """Rewrite a unit's table and tar without the rows, under new names; then update the unit's marker.

    Return the table's name.
    """
    storage = markers.storage
    table = storage.read_table(facts["table"])
    hit = pc.is_in(table["key"], takedown.keys)
    done = pc.and_(pc.equal(table["reason"], REMOVED), pc.equal(table["url"], ""))
    if not pc.any(pc.and_not(hit, done)).as_py():
        return str(facts["table"])
    removed = hit.to_pylist()
    if facts["tar"] and not storage.exists(facts["tar"]):  # the kept images are in the shards only
        facts = {**facts, "tar": "", "freed": True}
    with scratch() as folder:
        tar, digest, written = folder / "staged.tar", hashlib.sha256(), list[int]()
        places_in_order = write_samples(tar, _images(storage, facts, table, removed, written), digest)
        places = dict(zip(written, places_in_order, strict=True))
        tar_name = f"staged/{unit}-{digest.hexdigest()[:16]}.tar" if places else ""
        if places:
            storage.put(tar, tar_name)
    if len(places) < len(_left(facts, table, removed)):
        facts = {**facts, "freed": True}
    scrubbed = _without(table, hit, takedown.kept, places)
    data = parquet_bytes(scrubbed)
    name = f"staged/{unit}-{sha256_of(data)[:16]}.parquet"
    storage.write(name, data)
    _carry_scores(storage, unit, facts["table"], name, takedown.keys)
    reasons = Counter(reason for reason in scrubbed["reason"].to_pylist() if reason not in ("", REMOVED))
    other = {fact: value for fact, value in facts.items() if not fact.startswith("failed")}
    failed = {"failed": sum(reasons.values()), **{f"failed.{reason}": n for reason, n in sorted(reasons.items())}}
    markers.mark(unit, {**other, "table": name, "tar": tar_name, **failed})
    return name


def _left(facts: Mapping[str, Any], table: pa.Table, removed: list[bool]) -> list[int]:
    """Return the rows whose images are staged and stay."""
    sizes = table["size"].to_pylist() if facts["tar"] else []
    return [row for row, size in enumerate(sizes) if size and not removed[row]]


def _images(
    storage: Storage, facts: Mapping[str, Any], table: pa.Table, removed: list[bool], written: list[int]
) -> Iterator[Sample]:
    """Yield the images that stay, and append their rows to `written`. Damaged ones are skipped and count as freed."""
    keys = table["key"].to_pylist()
    rows = _left(facts, table, removed)
    if rows:
        for row, stored in samples(storage, facts["table"], facts["tar"], rows, damaged_is_none=True):
            if stored is not None:
                written.append(row)
                yield Sample(keys[row], stored.jpeg, parts=stored.parts)


def _without(table: pa.Table, hit: pa.ChunkedArray, kept: pa.Array, places: Mapping[int, Place]) -> pa.Table:
    """Return a staged table in which the rows of `hit` keep only key and measures; images are at `places`."""
    held = pc.and_(pc.equal(table["reason"], REMOVED), pc.equal(table["detail"], HELD_PLACE))
    placed = pc.or_(pc.is_in(table["key"], kept), held)
    blank = {"url": "", "caption": "", "extra": "{}", "reason": REMOVED, "detail": pc.if_else(placed, HELD_PLACE, "")}
    columns = {name: table[name] for name in table.column_names}
    columns |= {name: pc.if_else(hit, value, table[name]) for name, value in blank.items()}
    found = [places.get(row, Place(0, 0, 0, None)) for row in range(len(table))]
    columns |= {"offset": pa.array([p.offset for p in found]), "size": pa.array([p.size for p in found])}
    columns[CRC32.name] = pa.array([p.crc32 for p in found], CRC32.type)
    columns |= part_columns([p.parts for p in found], parts_in(table.column_names))
    more = [field for field in REFERENCE if field.name in table.column_names]
    schema = pa.schema([*STAGED_SCHEMA, *more, *part_fields(parts_in(table.column_names))])
    return without_references(pa.table(columns).select(schema.names).cast(schema), hit)


def _carry_scores(storage: Storage, unit: str, before: str, after: str, keys: pa.Array) -> None:
    """Rename a unit's score files to match its new staged table, without the values of the rows of `keys`.

    Files that belong to an earlier staged table keep their names; the next scoring updates them.
    """
    markers = MarkerLog(storage, "score")
    facts = markers.read().get(unit, {})
    files, follow = dict(facts.get("files", {})), facts.get("table") == before
    for scorer, name in files.items():
        table = storage.read_table(name)
        hit = pc.is_in(table["key"], keys).to_pylist()
        rows = pa.array([None if removed else row for row, removed in enumerate(hit)], pa.int64())
        blank = table.take(rows)
        columns = [pc.fill_null(blank[f.name], "") if not f.nullable else blank[f.name] for f in table.schema]
        columns[table.schema.get_field_index("key")] = table["key"]
        if follow:
            files[scorer] = f"{name.rpartition('/')[0]}/{after.rpartition('/')[2]}"
        storage.write_table(files[scorer], pa.table(columns, schema=table.schema))
    if follow:
        markers.mark(unit, {**facts, "table": after, "files": files})
    storage.delete(*(name for name in storage.names("scores") if name.endswith(f"/{before.rpartition('/')[2]}")))


def _sweep(storage: Storage) -> None:
    """Delete staged files that no marker names, reports and comparisons: they may show removed rows."""
    named = {
        facts[kind] for markers in ingests(storage) for facts in markers.read().values() for kind in ("table", "tar")
    }
    storage.delete(*(name for name in storage.names("staged") if name not in named))
    comparisons = [
        name for name in storage.names("captions") if name.startswith("captions/diff-") and name.count("/") == 1
    ]
    storage.delete("report.html", "samples.png", *comparisons)
