"""Takedown: rows that must go → a dataset that holds neither their images nor their words, and never will again.

    find        which rows are asked for, and which others hold the very same file
    block       their keys, addresses and sums go on the dataset's blocklist (pipeline.blocklist)
    scrub       plan tables, staged tables and tars, scores, captions, latents: rewritten where they hold one of them;
                reports, and comparisons of captions, are dropped
    (select)    shards, ledger, indexes and manifest follow from what is staged: pipeline.job packs what has changed
    finish      latents are named after the new shards, the log gets its line

    removed/pending.parquet    what is being removed: there until all is done, so that what was killed goes on
    removed/log.jsonl          a line a takedown: its date, what was asked, how many rows and shards it took

Of a removed row stay its key, its sums and its sizes: the row is `rejected`, with the reason `removed`. One that was
kept holds its place (see select), so that its neighbours stay in their shards and near copies of it stay out.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline import config
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Sample, read_manifest, sha256_of, write_tar
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.pack.carryover import clear
from capstan.pipeline.pack.scrub import scrub_derived, settle_latents
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.records import REMOVED
from capstan.pipeline.select.conditions import HELD_PLACE
from capstan.pipeline.source.blocklist import (
    FOLDER,
    KINDS,
    Blocklist,
    add_removed,
    read_lists,
    scrub_planned,
    url_digest,
)
from capstan.pipeline.source.plan import read_plan
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units import MarkerLog

log = logging.getLogger(__name__)

_PENDING: Final = f"{FOLDER}/pending.parquet"
_LOG: Final = f"{FOLDER}/log.jsonl"
_SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),  # its digest
        pa.field("shard", pa.string(), nullable=False),  # that it was kept in, or ""
    ]
)


@dataclass(frozen=True)
class Takedown:
    """What is being removed: rows as _SCHEMA has them, and the numbers of entries that were asked for."""

    rows: pa.Table
    asked: dict[str, int]

    @property
    def keys(self) -> pa.Array:
        return self.rows["key"].combine_chunks()

    @property
    def shards(self) -> list[str]:
        """The shards that hold some of the rows."""
        return sorted(set(self.rows["shard"].to_pylist()) - {""})

    @property
    def kept(self) -> pa.Array:
        """Keys of the rows that were in a shard."""
        return self.rows.filter(pc.not_equal(self.rows["shard"], ""))["key"].combine_chunks()


def take_down(storage: Storage, lists: config.Blocklist) -> Takedown:
    """Scrub what `lists` (files of entries) name. The dataset is whole again once it was selected anew.

    Raises RecipeError for lists that cannot be read or are empty, and where there is no dataset.
    """
    asked = read_lists(lists, lambda kind: f"--{kind}")
    if not asked:
        raise RecipeError("remove", "nothing is asked for", "name a file with --keys, --urls, --domains or --sha256")
    if not (plan := read_plan(storage)).units:
        raise RecipeError(storage.field, f"no dataset at {storage.url}", "name a folder that `capstan build` made")
    before = resume(storage)
    rows = _find(storage, [unit.table for unit in plan.units], asked)
    counts = Counter({kind: len(getattr(asked, kind)) for kind in KINDS if getattr(asked, kind)})
    if before is not None:  # which was killed: they end together
        rows, counts = before.rows.to_pylist() + rows, counts + Counter(before.asked)
    pending = pa.Table.from_pylist(rows, _SCHEMA).replace_schema_metadata({"asked": json.dumps(dict(counts))})
    # First the blocklist: a build that comes in between must not bring back what is asked for here.
    add_removed(storage, asked)
    storage.write_table(_PENDING, pending)
    takedown = resume(storage)
    assert takedown is not None
    return takedown


def resume(storage: Storage) -> Takedown | None:
    """Scrub what is pending, if anything is."""
    takedown = _pending(storage)
    if takedown is None:
        return None
    columns = {kind: frozenset(takedown.rows[name].to_pylist()) - {""} for kind, name in _BLOCKS.items()}
    add_removed(storage, Blocklist(**columns))
    if len(takedown.rows):
        for unit in read_plan(storage).units:
            _scrub_plan(storage, unit.table, takedown.keys)
        for markers in _ingests(storage):
            for unit_id, facts in markers.read().items():
                _scrub_staged(markers, unit_id, facts, takedown)
        scrub_derived(storage, takedown.keys, takedown.shards, _packed(storage))
        _sweep(storage)
    return takedown


_BLOCKS: Final = {"keys": "key", "sha256": "sha256", "urls": "url"}


def finish(storage: Storage) -> None:
    """The dataset is whole again: end what is pending, if anything is, with a line in the log."""
    takedown = _pending(storage)
    if takedown is None:
        return
    settle_latents(storage, read_manifest(storage))
    clear(storage)  # where packing was killed just before it did
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
    """What the dataset was made by, as its manifest tells it; None before it was packed."""
    manifest = read_manifest(storage)
    if manifest is None:
        return None
    return config.validate(Recipe, {"dataset": storage.url, "storage": storage.options, **manifest.recipe})


def _pending(storage: Storage) -> Takedown | None:
    if not storage.exists(_PENDING):
        return None
    rows = storage.read_table(_PENDING)
    return Takedown(rows, json.loads(rows.schema.metadata[b"asked"]))


# Finding -------------------------------------------------------------------------------------------------------------


def _find(storage: Storage, planned: list[str], asked: Blocklist) -> list[dict[str, str]]:
    """Rows (_SCHEMA) that `asked` names, or whose file is one of theirs, by the tables that hold their words."""
    staged = [facts["table"] for markers in _ingests(storage) for facts in markers.read().values()]
    found: dict[str, dict[str, str]] = {}
    for name in (*planned, *staged):
        _note(storage, name, asked, found)
    same_files = Blocklist(sha256=frozenset(row["sha256"] for row in found.values()) - {""})
    if same_files.sha256 - asked.sha256:
        for name in staged:
            _note(storage, name, same_files, found)
    kept = _kept(storage, found.keys())
    _drop_reasons(storage, [row["address"] for row in found.values()])
    return [
        {"key": key, "sha256": row["sha256"], "url": row["url"], "shard": kept.get(key, "")}
        for key, row in sorted(found.items())
    ]


def _note(storage: Storage, name: str, wanted: Blocklist, found: dict[str, dict[str, str]]) -> None:
    """Add the rows of a plan's or a staged table that are `wanted` and hold more than a key."""
    staged = name.startswith("staged/")
    said = "reason" if staged else "hash"
    table = storage.read_table(name, ["key", "url", said, *(["sha256"] if staged else [])])
    keys, urls, marks = (table[column].to_pylist() for column in ("key", "url", said))
    sums = table["sha256"].to_pylist() if staged else [""] * len(keys)
    for row, hit in enumerate(wanted.hits(keys, urls, sums)):
        if hit and (urls[row] or marks[row] != REMOVED):
            seen = found.setdefault(keys[row], {"sha256": "", "url": "", "address": ""})
            seen["sha256"] = seen["sha256"] or sums[row]
            if urls[row]:
                seen |= {"url": url_digest(urls[row]), "address": urls[row]}


def _kept(storage: Storage, keys: Iterable[str]) -> dict[str, str]:
    """Key → shard of those that the dataset holds; by the shards, as there is no ledger while they are packed anew."""
    manifest, wanted = read_manifest(storage), pa.array(keys, pa.string())
    shards: dict[str, str] = {}
    if manifest is not None and len(wanted):
        tables = ahead(lambda entry: storage.read_table(entry.table, ["key"])["key"], manifest.shards)
        for entry, held in zip(manifest.shards, tables, strict=True):
            shards |= dict.fromkeys(held.filter(pc.is_in(held, wanted)).to_pylist(), entry.name)
    return shards


def _packed(storage: Storage) -> set[tuple[str, str]]:
    """Shards (name, sum) as they are now, also those that no manifest lists while others are packed anew."""
    manifest = read_manifest(storage)
    listed = {(entry.name, entry.sha256) for entry in (manifest.shards if manifest else [])}
    return listed | {(facts["name"], facts["sha256"]) for facts in MarkerLog(storage, "pack").read().values()}


def _ingests(storage: Storage) -> list[MarkerLog]:
    """Return the markers of every ingest job that has left any, whatever its image settings."""
    names = {name.split("/")[1] for name in storage.names("state") if name.startswith("state/ingest-")}
    return [MarkerLog(storage, name) for name in sorted(names)]


# Scrubbing -----------------------------------------------------------------------------------------------------------


def _scrub_plan(storage: Storage, name: str, keys: pa.Array) -> None:
    here = pc.is_in(storage.read_table(name, ["key"])["key"], keys)
    if not pc.any(here).as_py():
        return
    table = storage.read_table(name)
    if pc.any(pc.and_(here, pc.not_equal(table["hash"], REMOVED))).as_py():
        storage.write_table(name, scrub_planned(table, here.to_pylist()))


def _scrub_staged(markers: MarkerLog, unit: str, facts: Mapping[str, Any], takedown: Takedown) -> None:
    """Table and tar of a unit without the rows; published under new names, then named by the unit's marker."""
    storage = markers.storage
    table = storage.read_table(facts["table"])
    hit = pc.is_in(table["key"], takedown.keys)
    done = pc.and_(pc.equal(table["reason"], REMOVED), pc.equal(table["url"], ""))
    if not pc.any(pc.and_not(hit, done)).as_py():
        return
    removed = hit.to_pylist()
    freed = bool(facts["tar"]) and not storage.exists(facts["tar"])  # what is kept is in the shards only
    if freed:
        facts = {**facts, "tar": "", "freed": True}
    with scratch() as folder:
        tar, digest = folder / "staged.tar", hashlib.sha256()
        places = write_tar(tar, _images(storage, facts, table, removed), digest)
        spans = dict(zip(_left(facts, table, removed), places, strict=True))
        tar_name = f"staged/{unit}-{digest.hexdigest()[:16]}.tar" if spans else ""
        if spans:
            storage.put(tar, tar_name)
    scrubbed = _without(table, hit, takedown.kept, [spans.get(row, (0, 0)) for row in range(len(table))])
    data = parquet_bytes(scrubbed)
    name = f"staged/{unit}-{sha256_of(data)[:16]}.parquet"
    storage.write(name, data)
    _carry_scores(storage, unit, facts["table"], name, takedown.keys)
    reasons = Counter(reason for reason in scrubbed["reason"].to_pylist() if reason not in ("", REMOVED))
    other = {fact: value for fact, value in facts.items() if not fact.startswith("failed")}
    failed = {"failed": sum(reasons.values()), **{f"failed.{reason}": n for reason, n in sorted(reasons.items())}}
    markers.mark(unit, {**other, "table": name, "tar": tar_name, **failed})


def _left(facts: Mapping[str, Any], table: pa.Table, removed: list[bool]) -> list[int]:
    """The rows whose images stay, and are staged."""
    sizes = table["size"].to_pylist() if facts["tar"] else []
    return [row for row, size in enumerate(sizes) if size and not removed[row]]


def _images(storage: Storage, facts: Mapping[str, Any], table: pa.Table, removed: list[bool]) -> Iterator[Sample]:
    keys, offsets, sizes = (table[name].to_pylist() for name in ("key", "offset", "size"))
    rows = _left(facts, table, removed)
    if rows:
        with storage.open(facts["tar"]) as tar:
            for row in rows:
                tar.seek(offsets[row])
                yield Sample(keys[row], tar.read(sizes[row]))


def _without(table: pa.Table, hit: pa.ChunkedArray, kept: pa.Array, spans: list[tuple[int, int]]) -> pa.Table:
    """A staged table: of the rows that are hit only key and measures stay; images lie at `spans` (offset, size)."""
    held = pc.and_(pc.equal(table["reason"], REMOVED), pc.equal(table["detail"], HELD_PLACE))
    placed = pc.or_(pc.is_in(table["key"], kept), held)
    said = {"url": "", "caption": "", "extra": "{}", "reason": REMOVED, "detail": pc.if_else(placed, HELD_PLACE, "")}
    columns = {name: table[name] for name in table.column_names}
    columns |= {name: pc.if_else(hit, value, table[name]) for name, value in said.items()}
    columns |= {"offset": pa.array([span[0] for span in spans]), "size": pa.array([span[1] for span in spans])}
    return pa.table(columns, schema=table.schema)


def _carry_scores(storage: Storage, unit: str, before: str, after: str, keys: pa.Array) -> None:
    """Files of scores are named as the staged table that they belong to: they follow it, without what is said of the
    rows of `keys`. Those of what was staged earlier, which the next scoring looks at, stay where they are."""
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
    """Remove staged files that no marker names, and reports and comparisons: they may show what was removed."""
    named = {
        facts[kind] for markers in _ingests(storage) for facts in markers.read().values() for kind in ("table", "tar")
    }
    storage.delete(*(name for name in storage.names("staged") if name not in named))
    compared = [
        name for name in storage.names("captions") if name.startswith("captions/diff-") and name.count("/") == 1
    ]
    storage.delete("report.html", "samples.png", *compared)


def _drop_reasons(storage: Storage, addresses: list[str]) -> None:
    """Forget why units were quarantined where that names one of the addresses: the next build tries them again."""
    wanted = [address for address in addresses if address]
    for name in storage.names("state"):
        if "/quarantine/" in name:
            text = storage.read(name).decode()
            if any(json.dumps(address)[1:-1] in text for address in wanted):
                storage.delete(name)
