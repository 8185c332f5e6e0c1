"""Removal of rows from the planned and staged tables, tars and scores of their units, on workers"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.parts import part_columns, part_fields, parts_in
from capstan.pipeline.dataset.shards import Place, Sample, sha256_of, write_samples
from capstan.pipeline.ingest.job import STAGED_SCHEMA
from capstan.pipeline.ingest.references import REFERENCE, without_references
from capstan.pipeline.ingest.staging import samples
from capstan.pipeline.pack.named_rows import ingests
from capstan.pipeline.records import CRC32, REMOVED
from capstan.pipeline.select.conditions import HELD_PLACE
from capstan.pipeline.source.blocklist import scrub_planned
from capstan.pipeline.source.plan import read_plan
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units import Job, MarkerLog, Piece, Unit, results

_SCORES: Final = "score"  # the job of scorers


class ScrubUnits(Job):
    """The job that rewrites what holds rows of one ingest unit. It may be repeated for a unit at any moment."""

    name, title = "takedown", "remove"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Yield one piece: the names of staged tables before and after."""
        spec, renamed = unit.spec, dict[str, str]()
        keys, kept = (pa.array(spec[name], pa.string()) for name in ("keys", "kept"))
        if spec["planned"]:
            _scrub_plan(self.storage, spec["planned"], keys)
        for job, facts in spec["staged"]:
            markers = MarkerLog(self.storage, job)
            renamed[facts["table"]] = _scrub_staged(markers, unit.id, facts, spec["scored"], keys, kept)
        yield {"renamed": renamed}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts


def scrub_units(storage: Storage, rows: pa.Table, progress: bool) -> dict[str, str]:
    """Rewrite what holds the `rows` (named_rows.SCHEMA; all units, if an older version left out their units).

    Returns staged table before → after.
    """
    planned = {unit.id: unit.table for unit in read_plan(storage).units}
    staged: dict[str, list[tuple[str, Any]]] = {}
    for markers in ingests(storage):
        for unit, facts in markers.read().items():
            staged.setdefault(unit, []).append((markers.name, facts))
    scored = MarkerLog(storage, _SCORES).read()
    keys = _keys(rows, sorted(planned.keys() | staged.keys()))
    units = [
        Unit(
            unit,
            {
                "planned": planned.get(unit, ""),
                "staged": staged.get(unit, []),
                "scored": scored.get(unit, {}),
                "keys": [key for key, _ in named],
                "kept": [key for key, shard in named if shard],
            },
        )
        for unit, named in keys.items()
    ]
    done = results(ScrubUnits(storage), units, Resources(), progress=progress)
    _drop_scores(storage, keys.keys())
    return {before: after for facts in done for before, after in facts["renamed"].items()}


def _keys(rows: pa.Table, units: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Return unit → (key, shard) of its rows."""
    pairs = list(zip(rows["key"].to_pylist(), rows["shard"].to_pylist(), strict=True))
    if "unit" not in rows.column_names:
        return dict.fromkeys(units, pairs)
    found: dict[str, list[tuple[str, str]]] = {}
    for pair, unit in zip(pairs, rows["unit"].to_pylist(), strict=True):
        found.setdefault(unit, []).append(pair)
    return {unit: found[unit] for unit in units if unit in found}


def _drop_scores(storage: Storage, units: Collection[str]) -> None:
    """Delete files of scores that belong to former staged tables of these units: they hold what was measured of rows
    that are removed.
    """
    named = {name for facts in MarkerLog(storage, _SCORES).read().values() for name in facts.get("files", {}).values()}
    former = (name for name in storage.names("scores") if name.endswith(".parquet") and name not in named)
    storage.delete(*(name for name in former if name.rpartition("/")[2].rpartition("-")[0] in units))


def _scrub_plan(storage: Storage, name: str, keys: pa.Array) -> None:
    here = pc.is_in(storage.read_table(name, ["key"])["key"], keys)
    if not pc.any(here).as_py():
        return
    table = storage.read_table(name)
    if pc.any(pc.and_(here, pc.not_equal(table["hash"], REMOVED))).as_py():
        storage.write_table(name, scrub_planned(table, here.to_pylist()))


def _scrub_staged(
    markers: MarkerLog, unit: str, facts: Mapping[str, Any], scored: Mapping[str, Any], keys: pa.Array, kept: pa.Array
) -> str:
    """Rewrite a unit's table and tar without the rows of `keys`, under new names; then update the unit's markers.

    `facts` and `scored` are what its markers say, `kept` the keys of rows that a shard holds. Returns the table's name.
    """
    storage = markers.storage
    table = storage.read_table(facts["table"])
    hit = pc.is_in(table["key"], keys)
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
    scrubbed = _without(table, hit, kept, places)
    data = parquet_bytes(scrubbed)
    name = f"staged/{unit}-{sha256_of(data)[:16]}.parquet"
    storage.write(name, data)
    _carry_scores(storage, unit, scored, facts["table"], name, keys)
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


def _carry_scores(
    storage: Storage, unit: str, facts: Mapping[str, Any], before: str, after: str, keys: pa.Array
) -> None:
    """Rename a unit's score files to match its new staged table, without the values of the rows of `keys`.

    Files that belong to an earlier staged table keep their names; the next scoring updates them. Nothing is removed
    here: a worker that dies is followed by one that reads the same files.
    """
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
        MarkerLog(storage, "score").mark(unit, {**facts, "table": after, "files": files})
