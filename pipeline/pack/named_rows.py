"""Entries of a takedown → the rows that they name, and all others that hold the same files

Only units that may hold such rows are read: by the first keys of the plan's units, and by the index of URLs, domains
and sums (pipeline.pack.row_lookup).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.shards import read_manifest
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.pack import row_lookup
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.records import REMOVED
from capstan.pipeline.source.blocklist import Blocklist, url_digest
from capstan.pipeline.source.plan import Plan, units_of_keys
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog

SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),  # its digest
        pa.field("shard", pa.string(), nullable=False),  # the shard that held it, or ""
        pa.field("unit", pa.string(), nullable=False),
    ]
)


def ingests(storage: Storage) -> list[MarkerLog]:
    """Return the markers of every ingest job that has left any, for any image settings."""
    names = {name.split("/")[1] for name in storage.names("state") if name.startswith("state/ingest-")}
    return [MarkerLog(storage, name) for name in sorted(names)]


def row_tables(storage: Storage, plan: Plan) -> dict[str, str]:
    """Return the name of each planned and staged table → its unit, planned ones first."""
    staged = {facts["table"]: unit for markers in ingests(storage) for unit, facts in markers.read().items()}
    return {unit.table: unit.id for unit in plan.units} | staged


def find_rows(storage: Storage, plan: Plan, asked: Blocklist, progress: bool) -> list[dict[str, str]]:
    """Return the rows (SCHEMA) that `asked` names or that hold the same files, from planned and staged tables."""
    tables = row_tables(storage, plan)
    staged = {name: unit for name, unit in tables.items() if name.startswith("staged/")}
    row_lookup.cover(storage, tables, Resources(), progress=progress)
    found: dict[str, dict[str, str]] = {}
    units = row_lookup.units_with(storage, tables, asked)
    units |= {unit.id for unit in units_of_keys(storage, plan, asked.keys)}
    _note(storage, {name: unit for name, unit in tables.items() if unit in units}, asked, found)
    same_files = Blocklist(sha256=frozenset(row["sha256"] for row in found.values()) - {""})
    if same_files.sha256 - asked.sha256:
        units = row_lookup.units_with(storage, staged, same_files)
        _note(storage, {name: unit for name, unit in staged.items() if unit in units}, same_files, found)
    kept = _kept(storage, found)
    _drop_reasons(storage, [row["url"] for row in found.values()])
    return [
        {"key": key, "sha256": row["sha256"], "url": row["url_digest"], "shard": kept.get(key, ""), "unit": row["unit"]}
        for key, row in sorted(found.items())
    ]


def _note(storage: Storage, tables: Mapping[str, str], wanted: Blocklist, found: dict[str, dict[str, str]]) -> None:
    """Add to `found` the rows of planned or staged tables that are `wanted` and not removed already."""
    for name, unit in tables.items():
        staged = name.startswith("staged/")
        mark_column = "reason" if staged else "hash"
        table = storage.read_table(name, ["key", "url", mark_column, *(["sha256"] if staged else [])])
        keys, urls, marks = (table[column].to_pylist() for column in ("key", "url", mark_column))
        sums = table["sha256"].to_pylist() if staged else [""] * len(keys)
        for row, hit in enumerate(wanted.hits(keys, urls, sums)):
            if hit and (urls[row] or marks[row] != REMOVED):
                seen = found.setdefault(keys[row], {"sha256": "", "url_digest": "", "url": "", "unit": unit})
                seen["sha256"] = seen["sha256"] or sums[row]
                if urls[row] and not seen["url"]:  # planned tables come first, with the URL as the source has it
                    seen |= {"url_digest": url_digest(urls[row]), "url": urls[row]}


def _kept(storage: Storage, found: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return key → shard for the rows that are in the shards, by the ledger.

    While the dataset is repacked, or if the ledger is damaged, the shards are read instead.
    """
    manifest, wanted = read_manifest(storage), pa.array(found, pa.string())
    if manifest is None or not len(wanted):
        return {}
    if manifest.complete:
        names = {f"unit-{row['unit']}" for row in found.values()}
        listed = [(entry.table, entry.sha256, "") for entry in manifest.ledger if entry.name in names]
        with contextlib.suppress(DamagedFile, FileNotFoundError):
            return _places(storage, listed, wanted)
    return _places(storage, [(entry.table, entry.table_sha256, entry.name) for entry in manifest.shards], wanted)


def _places(storage: Storage, tables: list[tuple[str, str, str]], wanted: pa.Array) -> dict[str, str]:
    """Return key → shard for the `wanted` keys in tables, given by name, SHA-256, and shard ("": in a column)."""
    shards: dict[str, str] = {}
    read = ahead(lambda one: storage.read_table(one[0], ["key", *([] if one[2] else ["shard"])], sha256=one[1]), tables)
    for (_, _, shard), table in zip(tables, read, strict=True):
        held = table.filter(pc.is_in(table["key"], wanted))
        names = [shard] * len(held) if shard else held["shard"].to_pylist()
        shards |= {key: name for key, name in zip(held["key"].to_pylist(), names, strict=True) if name}
    return shards


def _drop_reasons(storage: Storage, urls: list[str]) -> None:
    """Delete quarantine records that mention one of the URLs. The next build retries their units."""
    wanted = [url for url in urls if url]
    for name in storage.names("state"):
        if "/quarantine/" in name:
            text = storage.read(name).decode()
            if any(json.dumps(url)[1:-1] in text for url in wanted):
                storage.delete(name)
