"""Entries of a takedown → the rows that they name, and all others that hold the same files

Only units that may hold such rows are read: by the first keys of the plan's units, and by the index of URLs, domains
and sums (pipeline.pack.row_lookup). Workers read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.shards import read_manifest
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.pack import row_lookup
from capstan.pipeline.records import REMOVED
from capstan.pipeline.source.blocklist import Blocklist, url_digest
from capstan.pipeline.source.plan import Plan, units_of_keys
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, MarkerLog, Piece, Unit, results

_TABLES: Final = 16  # that one worker reads to find shards
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
    _note(storage, {name: unit for name, unit in tables.items() if unit in units}, asked, found, progress)
    same_files = Blocklist(sha256=frozenset(row["sha256"] for row in found.values()) - {""})
    if same_files.sha256 - asked.sha256:
        units = row_lookup.units_with(storage, staged, same_files)
        _note(storage, {name: unit for name, unit in staged.items() if unit in units}, same_files, found, progress)
    kept = _kept(storage, found, progress)
    _drop_reasons(storage, [row["url"] for row in found.values()])
    return [
        {"key": key, "sha256": row["sha256"], "url": row["url_digest"], "shard": kept.get(key, ""), "unit": row["unit"]}
        for key, row in sorted(found.items())
    ]


class FindRows(Job):
    """The job that looks for rows in the planned and staged tables of a unit, planned ones first."""

    name, title = "takedown-find", "remove: rows"

    def __init__(self, storage: Storage, wanted: Blocklist) -> None:
        self.storage, self.wanted = storage, wanted

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Yield one piece: key → sum, URL and its digest, of the rows that are wanted and not removed already."""
        found: dict[str, dict[str, str]] = {}
        for name in unit.spec["tables"]:
            staged = name.startswith("staged/")
            mark_column = "reason" if staged else "hash"
            table = self.storage.read_table(name, ["key", "url", mark_column, *(["sha256"] if staged else [])])
            keys, urls, marks = (table[column].to_pylist() for column in ("key", "url", mark_column))
            sums = table["sha256"].to_pylist() if staged else [""] * len(keys)
            for row, hit in enumerate(self.wanted.hits(keys, urls, sums)):
                if hit and (urls[row] or marks[row] != REMOVED):
                    _add(found, keys[row], {"sha256": sums[row], "url": urls[row], "unit": unit.id})
        yield {"found": found}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts


def _add(found: dict[str, dict[str, str]], key: str, row: dict[str, str]) -> None:
    """Add what one more table says about a row. A URL is that of the first table that has one."""
    seen = found.setdefault(key, {"sha256": "", "url_digest": "", "url": "", "unit": row["unit"]})
    seen["sha256"] = seen["sha256"] or row["sha256"]
    if row["url"] and not seen["url"]:
        seen |= {"url_digest": url_digest(row["url"]), "url": row["url"]}


def _note(
    storage: Storage, tables: Mapping[str, str], wanted: Blocklist, found: dict[str, dict[str, str]], progress: bool
) -> None:
    """Add to `found` the rows of planned or staged tables that are `wanted` and not removed already."""
    of_unit: dict[str, list[str]] = {}
    for name, unit in tables.items():
        of_unit.setdefault(unit, []).append(name)
    work = [Unit(unit, {"tables": names}) for unit, names in of_unit.items()]
    for facts in results(FindRows(storage, wanted), work, Resources(), progress=progress):
        for key, row in facts["found"].items():
            _add(found, key, row)


class FindPlaces(FindRows):
    """The job that looks up in which shards rows are: in ledger tables, or in tables of shards."""

    name, title = "takedown-places", "remove: shards"

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Yield one piece: key → shard, and whether all of the unit's tables could be read."""
        wanted, shards = pa.array(sorted(self.wanted.keys), pa.string()), dict[str, str]()
        try:
            for name, sha256, shard in unit.spec["tables"]:
                table = self.storage.read_table(name, ["key", *([] if shard else ["shard"])], sha256=sha256)
                held = table.filter(pc.is_in(table["key"], wanted))
                names = [shard] * len(held) if shard else held["shard"].to_pylist()
                shards |= {key: place for key, place in zip(held["key"].to_pylist(), names, strict=True) if place}
        except (DamagedFile, FileNotFoundError):
            if not unit.spec["may_fail"]:
                raise
            yield {"shards": {}, "whole": False}
        else:
            yield {"shards": shards, "whole": True}


def _kept(storage: Storage, found: Mapping[str, Mapping[str, str]], progress: bool) -> dict[str, str]:
    """Return key → shard for the rows that are in the shards, by the ledger.

    While the dataset is repacked, or if the ledger is damaged, the shards are read instead.
    """
    manifest = read_manifest(storage)
    if manifest is None or not found:
        return {}
    if manifest.complete:
        units = {f"unit-{row['unit']}" for row in found.values()}
        listed = [(entry.table, entry.sha256, "") for entry in manifest.ledger if entry.name in units]
        if (places := _places(storage, listed, found, progress, may_fail=True)) is not None:
            return places
    listed = [(entry.table, entry.table_sha256, entry.name) for entry in manifest.shards]
    places = _places(storage, listed, found, progress)
    assert places is not None
    return places


def _places(
    storage: Storage,
    tables: list[tuple[str, str, str]],
    wanted: Iterable[str],
    progress: bool,
    *,
    may_fail: bool = False,
) -> dict[str, str] | None:
    """Return key → shard for the `wanted` keys in tables, given by name, SHA-256, and shard ("": in a column).

    None if one cannot be read and they `may_fail`.
    """
    parts = [tables[start : start + _TABLES] for start in range(0, len(tables), _TABLES)]
    work = [Unit(f"{number:06d}", {"tables": part, "may_fail": may_fail}) for number, part in enumerate(parts)]
    job = FindPlaces(storage, Blocklist(keys=frozenset(wanted)))
    done = results(job, work, Resources(), progress=progress)
    if not all(facts["whole"] for facts in done):
        return None
    return {key: shard for facts in done for key, shard in facts["shards"].items()}


def _drop_reasons(storage: Storage, urls: list[str]) -> None:
    """Delete quarantine records that mention one of the URLs. The next build retries their units."""
    wanted = [url for url in urls if url]
    for name in storage.names("state"):
        if "/quarantine/" in name:
            text = storage.read(name).decode()
            if any(json.dumps(url)[1:-1] in text for url in wanted):
                storage.delete(name)
