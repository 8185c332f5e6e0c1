"""URLs, domains and SHA-256 sums → the units whose rows may have them

    state/lookup/index.json                      the runs, and the tables that they cover
    state/lookup/<hash>/part-000.parquet         hash, unit: sorted by hash (dataset.sorted_runs)

A takedown asks for a few rows of a billion. Hashes of every URL (as planned and as staged), of every domain and its
parents, and of every source file lead to the units to read, so that its cost does not grow with the dataset. An entry
too many costs a read; what an entry leads to is always compared with the rows themselves.

The index is written on workers: each reads the tables of some units, then each merges a range of hashes. Tables that
are not covered yet are few, and are read by who asks. New tables make a new run, which takes up all runs that are not
larger: n tables are in at most log2(n) runs, and are rewritten as often.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capstan.pipeline.config import Resources, fingerprint
from capstan.pipeline.dataset.sorted_runs import HASH, hash_of, ranges, rows_between, rows_with, write_run
from capstan.pipeline.errors import DamagedFile, Quarantined
from capstan.pipeline.source.blocklist import Blocklist, domain_digest, host_of, url_digest
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Unit, run_once

log = logging.getLogger(__name__)

_FOLDER: Final = "state/lookup"
_INDEX: Final = f"{_FOLDER}/index.json"
_UNIT: Final = pa.field("unit", pa.string(), nullable=False)
_SCHEMA: Final = pa.schema([HASH, _UNIT])
LEAST: Final = 16  # tables; fewer are not worth a run, and are read by who asks
_GROUP: Final = 32  # tables that a worker reads for one file
_PART_ROWS: Final = 8 << 20  # of a file of a run

Tables = Mapping[str, str]  # name of a planned or staged table → its unit


@dataclass(frozen=True)
class _Index:
    """The parts of each run, its number of rows, and the tables that the runs cover."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, storage: Storage) -> _Index:
        """Return the index; an empty one if there is none, or a damaged one."""
        try:
            record = storage.read_json(_INDEX, "")
            return cls(record["runs"], record["tables"])
        except FileNotFoundError:
            return cls()
        except (DamagedFile, KeyError) as error:
            log.warning("%s is damaged (%s): all rows are read", storage.path(_INDEX), error)
            return cls()

    def write(self, storage: Storage) -> None:
        """Publish the index; remove what it does not name."""
        storage.write(_INDEX, json.dumps(vars(self), separators=(",", ":"), sort_keys=True).encode())
        named = {_INDEX, *(part for one in self.runs for part in one["parts"])}
        storage.delete(*(name for name in storage.names(_FOLDER) if name not in named))


class _Read(Job):
    """The job that writes the hashes of some tables. Its markers name the file and its rows."""

    name, title = "lookup-build", "index of rows"

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        tables: Tables = unit.spec["tables"]
        rows = pa.concat_tables([_hashes(self.storage, table, of) for table, of in sorted(tables.items())])
        write_run(self.storage, unit.spec["part"], rows)
        yield {"parts": [unit.spec["part"]], "rows": len(rows)}

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts


class _Merge(_Read):
    """The job that merges a range of hashes of several runs."""

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        low, high = map(int, unit.spec["range"])
        rows = pa.concat_tables([rows_between(self.storage, part, low, high) for part in unit.spec["from"]])
        write_run(self.storage, unit.spec["part"], rows)
        yield {"parts": [unit.spec["part"]], "rows": len(rows)}


def _hashes(storage: Storage, name: str, unit: str) -> pa.Table:
    """Return the hashes of a planned or staged table's URLs, domains and sums (_SCHEMA), each once."""
    with storage.open(name) as file:
        table = pq.ParquetFile(file, page_checksum_verification=True).read(columns=["url", "sha256"])
    urls = [url for url in set(table["url"].to_pylist()) if url]
    sums = set(table["sha256"].to_pylist()) - {""} if "sha256" in table.column_names else set()
    found = {hash_of(digest) for digest in (*map(url_digest, urls), *_domains(urls), *sums)}
    return pa.table([pa.array(sorted(found), pa.uint64()), pa.repeat(unit, len(found))], schema=_SCHEMA)


def _domains(urls: Iterable[str]) -> Iterator[str]:
    """Yield the digest of each host and of the domains that it is in."""
    for host in set(map(host_of, urls)) - {""}:
        labels = host.split(".")
        yield from (domain_digest(".".join(labels[at:])) for at in range(max(len(labels) - 1, 1)))


def cover(storage: Storage, tables: Tables, resources: Resources, *, progress: bool = True) -> None:
    """Add tables to the index that it does not cover yet, if they are many."""
    index = _Index.read(storage)
    new = {name: unit for name, unit in tables.items() if index.tables.get(name) != unit}
    if len(new) < LEAST:
        return
    try:
        parts, rows = _read(storage, new, resources, progress)
        left = sorted(index.runs, key=lambda one: -int(one["rows"]))
        while left and left[-1]["rows"] <= rows:
            smaller = left.pop()
            rows, parts = rows + smaller["rows"], parts + smaller["parts"]
        if len(parts) > 1:
            parts, rows = _merge(storage, parts, rows, resources, progress)
    except Quarantined as error:  # what is not covered is read by who asks
        log.warning("%s", error)
        return
    covered = {name: unit for name, unit in index.tables.items() if name in tables} | new
    _Index([*left, {"parts": parts, "rows": rows}], covered).write(storage)


def _read(storage: Storage, tables: Tables, resources: Resources, progress: bool) -> tuple[list[str], int]:
    """Write the hashes of tables to files; return these, and their number of rows."""
    names = sorted(tables)
    groups = [{name: tables[name] for name in names[at : at + _GROUP]} for at in range(0, len(names), _GROUP)]
    work = [_unit(fingerprint(group), tables=group) for group in groups]
    return _sum(run_once(_Read(storage), work, resources, progress=progress))


def _merge(
    storage: Storage, parts: list[str], rows: int, resources: Resources, progress: bool
) -> tuple[list[str], int]:
    """Write the rows of files to one for each range of hashes; return these, and their number of rows."""
    work = [
        _unit(fingerprint([parts, low]), range=[str(low), str(high)], **{"from": parts})
        for low, high in ranges(-(-rows // _PART_ROWS))
    ]
    return _sum(run_once(_Merge(storage), work, resources, progress=progress))


def _sum(made: list[dict[str, Any]]) -> tuple[list[str], int]:
    return [part for facts in made for part in facts["parts"]], sum(facts["rows"] for facts in made)


def _unit(id_: str, **spec: Any) -> Unit:
    return Unit(id_, {"part": f"{_FOLDER}/{id_}.parquet", **spec})


def follow(storage: Storage, renamed: Mapping[str, str]) -> None:
    """Note that tables were rewritten with fewer URLs and sums, under other names ("" if they are gone)."""
    index = _Index.read(storage)
    if index.tables.keys() & renamed.keys():
        tables = {renamed.get(name, name): unit for name, unit in index.tables.items()}
        _Index(index.runs, {name: unit for name, unit in tables.items() if name}).write(storage)


def units_with(storage: Storage, tables: Tables, wanted: Blocklist) -> set[str]:
    """Return the units of `tables` whose rows may have one of the URLs, domains or sums."""
    if not (wanted.urls or wanted.domains or wanted.sha256):
        return set()
    index = _Index.read(storage)
    found = {unit for name, unit in tables.items() if index.tables.get(name) != unit}
    digests = {hash_of(digest) for digest in wanted.urls | wanted.domains | wanted.sha256}
    hashes = np.array(sorted(digests), np.uint64)
    try:
        for part in (part for one in index.runs for part in one["parts"]):
            found |= set(rows_with(storage, part, hashes)["unit"].to_pylist())
    except (DamagedFile, FileNotFoundError) as error:
        log.warning("%s: all rows are read", error)
        return set(tables.values())
    return found & set(tables.values())
