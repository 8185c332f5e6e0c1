"""Takedown: remove rows, their images and texts for good

    find        the rows that are named, and all others that hold the same file (pipeline.pack.named_rows)
    block       add their keys, URLs and sums to the dataset's blocklist (pipeline.source.blocklist)
    scrub       rewrite the plan tables, staged tables and tars, scores (pipeline.pack.scrub_units), captions and
                latents (pipeline.pack.scrub) that hold them, on workers; delete reports and caption comparisons
    (select)    pipeline.build repacks the shards, ledger, indexes and manifest that change (pipeline.pack.without)
    finish      bind the latents to the new shards, append to the log

    removed/pending.parquet    the rows being removed; kept until the end, so that an interrupted takedown resumes
    removed/log.jsonl          one line per takedown: date, entries, numbers of rows and shards

A removed row keeps its key, sums and sizes; it is `rejected` with the reason `removed`. A row that was in a shard holds
its place there (see select), so that its neighbours stay in their shards and near copies of it stay out.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline import config
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import read_manifest
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.pack import row_lookup
from capstan.pipeline.pack.carryover import clear
from capstan.pipeline.pack.named_rows import SCHEMA, find_rows, ingests
from capstan.pipeline.pack.scrub import scrub_derived, settle_latents
from capstan.pipeline.pack.scrub_units import scrub_units
from capstan.pipeline.select import column_blocks, kept_runs
from capstan.pipeline.source.blocklist import (
    FOLDER,
    KINDS,
    Blocklist,
    add_removed,
    read_lists,
)
from capstan.pipeline.source.plan import read_plan
from capstan.pipeline.source.plan_on_workers import discard
from capstan.pipeline.source.planning.batches import delete_unfinished
from capstan.pipeline.storage import Storage
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
    before = resume(storage, progress=progress)
    rows = find_rows(storage, plan, asked, progress)
    requests = {_request_id(asked): {kind: len(getattr(asked, kind)) for kind in KINDS if getattr(asked, kind)}}
    schema = SCHEMA
    if before is not None:  # an interrupted takedown, perhaps of the same entries: both end together
        rows, requests = before.rows.to_pylist() + rows, before.requests | requests
        schema = SCHEMA if before.units is not None else before.rows.schema
    rows_left = pa.Table.from_pylist(rows, schema).replace_schema_metadata({"requests": json.dumps(requests)})
    # The blocklist comes first: a build in between must not bring these rows back.
    add_removed(storage, asked)
    discard(storage)
    delete_unfinished(storage)
    storage.write_table(_PENDING, rows_left)
    takedown = resume(storage, progress=progress)
    assert takedown is not None
    return takedown


def resume(storage: Storage, *, progress: bool = False) -> Takedown | None:
    """Scrub the rows of a pending takedown, if there is one, and return it."""
    takedown = pending(storage)
    if takedown is None:
        return None
    columns = {kind: frozenset(takedown.rows[name].to_pylist()) - {""} for kind, name in _BLOCKS.items()}
    add_removed(storage, Blocklist(**columns))
    if len(takedown.rows):
        renamed = scrub_units(storage, takedown.rows, progress)
        row_lookup.follow(storage, renamed)
        column_blocks.forget(storage, takedown.units)
        kept_runs.forget(storage, takedown.units)
        scrub_derived(storage, _PENDING, takedown.rows, _packed(storage), progress)
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
