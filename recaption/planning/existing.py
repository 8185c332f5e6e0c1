"""Images of incomplete shards, and captions that exist → what each shard can reuse, on workers

    scan   a few shards or caption files → their images, or captions, sorted by hash of the image
    join   a range of hashes of all of these → the captions that exist of each shard's images, sorted by shard
    deal   a few shards of all ranges → the same, in one file (only if there are several ranges)
    save   a shard → its captions in aside/: committing one shard may overwrite the file with those of another's images

No process holds more than a range. The files are in state/recaption-plan/<layer>, relative to the storage `work`, and
are removed at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline import units
from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.shards import Dataset, ShardEntry
from capstan.pipeline.dataset.sorted_runs import HASH, hash_of, ranges, rows_between, write_run
from capstan.pipeline.storage import Storage
from capstan.recaption import store
from capstan.recaption.planning.contents import Content, Reads, images

_RANGE_ROWS: Final = 2 << 20  # images and captions that one worker joins
_SCANNED: Final = 16  # shards or files that one worker scans
_DEALT: Final = 256  # shards of a file of `deal`
_CAPTION, _STALE = -1, -2  # in the column `shard`: a caption of this layer; an image that another layer has
_SCANNED_SCHEMA: Final = pa.schema(
    [
        HASH,
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("quoted", pa.string(), nullable=False),
        pa.field("slot", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
    ]
)
# A shard's images that have a caption (`slot`, `file`), or that are captioned for an earlier shard (`elsewhere`).
_FOUND_SQL: Final = """
    CREATE TEMP TABLE wanted AS SELECT DISTINCT sha256, quoted, shard FROM scanned WHERE shard >= 0;
    CREATE TEMP TABLE have AS
        SELECT sha256, quoted, slot, min(file) AS file FROM scanned WHERE shard = -1 GROUP BY sha256, quoted, slot;
    CREATE TEMP TABLE contents AS
        SELECT sha256, quoted, min(shard) AS first, any_value(coalesce(n, 0)) AS n
        FROM wanted LEFT JOIN (SELECT sha256, quoted, count(*) AS n FROM have GROUP BY sha256, quoted)
            USING (sha256, quoted)
        GROUP BY sha256, quoted;
    SELECT shard::UBIGINT AS hash, sha256, quoted, coalesce(slot, '') AS slot, coalesce(file, '') AS file,
        n < $slots AND shard > first AND $sharing AS elsewhere
    FROM wanted JOIN contents USING (sha256, quoted) LEFT JOIN have USING (sha256, quoted)
    WHERE file IS NOT NULL OR elsewhere ORDER BY ALL
"""
_COUNTS_SQL: Final = """
    SELECT count(*) AS new, coalesce(sum($slots - n), 0)::BIGINT AS captions,
        count(DISTINCT sha256) FILTER (sha256 IN (SELECT sha256 FROM scanned WHERE shard = -2)) AS stale
    FROM contents WHERE n < $slots
"""


@dataclass(frozen=True)
class Found:
    """The file that has the captions of each shard's images, by the shard's number; and counts of all images.

    `new` images lack some of their captions, `captions` in all; `stale` of them have captions of another layer.
    """

    files: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def file(self, number: int) -> str:
        return self.files[number // _DEALT if len(self.files) > 1 else 0]


@dataclass
class Lookup:
    """A look-up of captions: `entries` are incomplete shards, `captions` the files that may have their captions.

    `others` are files of other layers. In a run (`resources`) its steps are units of the unit map, and `work` is the
    dataset's storage. Without, they are done in this process, and nothing is written but in `work`.
    """

    dataset: Dataset
    layer: str
    slots: tuple[str, ...]
    reads: Reads
    entries: Sequence[ShardEntry]
    captions: Sequence[str]
    others: Sequence[str]
    work: Storage
    resources: Resources | None
    progress: bool = True

    @property
    def folder(self) -> str:
        """The folder of its files, in `work`."""
        return f"state/recaption-plan/{self.layer}"

    def find(self, *, sharing: bool) -> Found:
        """Return which captions exist. With `sharing`, an image of several shards is captioned for the first."""
        self.clean()
        numbered = list(enumerate(self.entries))
        specs: list[dict[str, Any]] = [
            {"shards": [[n, e.model_dump()] for n, e in part]} for part in _parts(numbered, _SCANNED)
        ]
        specs += [{"captions": part} for part in _parts(self.captions, _SCANNED)]
        specs += [{"others": part} for part in _parts(self.others, _SCANNED)]
        scanned = self._run(_Scan(self), "scan", specs)
        files, rows = [facts["part"] for facts in scanned], sum(facts["rows"] for facts in scanned)
        bounds = ranges(max(1, -(-rows // _RANGE_ROWS)))
        joins = [{"from": files, "range": [str(low), str(high)], "sharing": sharing} for low, high in bounds]
        joined = self._run(_Join(self), "join", joins)
        counts = Counter[str]()
        for facts in joined:
            counts.update({name: facts[name] for name in ("new", "captions", "stale")})
        parts = [facts["part"] for facts in joined]
        if len(parts) > 1:
            starts = range(0, len(self.entries), _DEALT)
            deals = [{"from": parts, "range": [str(start), str(start + _DEALT)]} for start in starts]
            parts = [facts["part"] for facts in self._run(_Deal(self), "deal", deals)]
        return Found(parts, counts)

    def save(self, found: Found) -> list[dict[str, Any]]:
        """Copy each shard's captions to aside/; return for each the number of `rows`, and of images `elsewhere`."""
        specs = [
            {"number": number, "found": found.file(number), "aside": aside_name(self.layer, entry)}
            for number, entry in enumerate(self.entries)
        ]
        return self._run(_Save(self), "save", specs)

    def clean(self) -> None:
        """Remove the look-up's files."""
        self.work.delete(*self.work.names(self.folder))

    def _run(self, job: _Step, name: str, specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        job.name, job.title = f"recaption-plan-{self.layer}-{name}", f"recaption: {name}"
        ids = [f"{name}-{number:06d}" for number in range(len(specs))]
        work = [
            units.Unit(id_, {**spec, "part": f"{self.folder}/{id_}.parquet"})
            for id_, spec in zip(ids, specs, strict=True)
        ]
        if self.resources is None:
            return [job.commit(unit, list(job.prepare(unit))) for unit in work]
        return units.run_once(job, work, self.resources, progress=self.progress)


def aside_name(layer: str, entry: ShardEntry) -> str:
    """Return the file in aside/ with the captions that exist of a shard's images."""
    return f"{store.aside(layer)}/{entry.name}-{entry.sha256[:16]}.parquet"


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def existing(work: Storage, file: str, number: int) -> tuple[dict[Content, set[str]], set[Content]]:
    """Return the slots that images of the shard `number` have captions of, and the images captioned elsewhere."""
    have, elsewhere = dict[Content, set[str]](), set[Content]()
    for row in rows_between(work, file, number, number + 1).to_pylist():
        content = Content(row["sha256"], row["quoted"])
        if row["file"]:
            have.setdefault(content, set()).add(row["slot"])
        if row["elsewhere"]:
            elsewhere.add(content)
    return have, elsewhere


class _Step(units.Job):
    """A step of the look-up. A unit writes the file `part`, and returns facts about it."""

    name = "recaption-plan"

    def __init__(self, lookup: Lookup) -> None:
        self.storage, self.source, self.dataset = lookup.work, lookup.dataset.storage, lookup.dataset.part()
        self.slots, self.reads = lookup.slots, lookup.reads

    def commit(self, unit: units.Unit, pieces: list[units.Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts

    def _write(self, unit: units.Unit, rows: pa.Table) -> dict[str, Any]:
        write_run(self.storage, unit.spec["part"], rows)
        return {"part": unit.spec["part"], "rows": len(rows)}


class _Scan(_Step):
    def prepare(self, unit: units.Unit) -> Iterator[units.Piece]:
        spec = unit.spec
        tables = [self._images(number, entry) for number, entry in spec.get("shards", ())]
        tables += [self._captions(name) for name in spec.get("captions", ())]
        tables += [self._stale(name) for name in spec.get("others", ())]
        yield self._write(unit, pa.concat_tables(tables))

    def _images(self, number: int, entry: Mapping[str, Any]) -> pa.Table:
        listed = images(self.dataset.part(entry), entry["name"], self.reads)
        found = sorted({image.content for image in listed})
        sums, quoted = [content.sha256 for content in found], [content.quoted for content in found]
        return _scanned(number, sums, quoted)

    def _captions(self, name: str) -> pa.Table:
        rows = captioned(self.source.read_table(name, ["sha256", "quoted", "slot", "finish"]))
        rows = rows.filter(pc.is_in(rows["slot"], pa.array(self.slots, pa.string())))
        sums, quoted, slots = (rows[column].to_pylist() for column in ("sha256", "quoted", "slot"))
        return _scanned(_CAPTION, sums, quoted, slots, name)

    def _stale(self, name: str) -> pa.Table:
        sums = captioned(self.source.read_table(name, ["sha256", "finish"]))["sha256"].unique().to_pylist()
        return _scanned(_STALE, sums)


def captioned(rows: pa.Table) -> pa.Table:
    """Return the rows that have a caption; unreadable and failed ones are tried again."""
    return rows.filter(pc.not_equal(rows["finish"], "none"))


def _scanned(
    shard: int, sums: Sequence[str], quoted: Sequence[str] = (), slots: Sequence[str] = (), file: str = ""
) -> pa.Table:
    none, count = pa.repeat("", len(sums)), len(sums)
    columns = [pa.array(list(values), pa.string()) if len(values) else none for values in (sums, quoted, slots)]
    hashes = pa.array([hash_of(sha256) for sha256 in sums], pa.uint64())
    return pa.table([hashes, pa.repeat(shard, count), *columns, pa.repeat(file, count)], schema=_SCANNED_SCHEMA)


class _Join(_Step):
    def prepare(self, unit: units.Unit) -> Iterator[units.Piece]:
        low, high = map(int, unit.spec["range"])
        rows = pa.concat_tables([rows_between(self.storage, part, low, high) for part in unit.spec["from"]])
        with duckdb.connect(config={"threads": "1"}) as db:
            db.register("scanned", rows)
            slots = {"slots": len(self.slots)}
            *created, found = _FOUND_SQL.split(";")
            for statement in created:
                db.execute(statement)
            table = db.sql(found, params={**slots, "sharing": unit.spec["sharing"]}).to_arrow_table()
            counts = db.execute(_COUNTS_SQL, slots).fetchone()
        assert counts is not None
        yield self._write(unit, table) | dict(zip(("new", "captions", "stale"), counts, strict=True))


class _Deal(_Step):
    def prepare(self, unit: units.Unit) -> Iterator[units.Piece]:
        low, high = map(int, unit.spec["range"])
        yield self._write(
            unit, pa.concat_tables([rows_between(self.storage, part, low, high) for part in unit.spec["from"]])
        )


class _Save(_Step):
    def prepare(self, unit: units.Unit) -> Iterator[units.Piece]:
        number = unit.spec["number"]
        found = rows_between(self.storage, unit.spec["found"], number, number + 1)
        there = found.filter(pc.not_equal(found["file"], ""))
        tables = [store.SCHEMA.empty_table()]
        for name in there["file"].unique().to_pylist():
            chosen = there.filter(pc.equal(there["file"], name))
            rows = captioned(self.source.read_table(name))
            rows = rows.filter(pc.is_in(_names(rows), _names(chosen).combine_chunks()))
            tables.append(_first_of_each(rows))
        rows = pa.concat_tables(tables)
        if len(rows):
            self.source.write_table(unit.spec["aside"], rows)
        elsewhere = found.filter(found["elsewhere"])
        yield {"rows": len(rows), "elsewhere": len(elsewhere)}


def _names(rows: pa.Table) -> pa.ChunkedArray:
    """Return image, quoted caption and slot of each row as one text."""
    return pc.binary_join_element_wise(rows["sha256"], rows["quoted"], rows["slot"], " ")


def _first_of_each(rows: pa.Table) -> pa.Table:
    """Return one row for each image, quoted caption and slot."""
    first: dict[str, int] = {}
    for place, name in enumerate(_names(rows).to_pylist()):
        first.setdefault(name, place)
    return rows.take(pa.array(sorted(first.values()), pa.int64()))


def files_of(names: Iterable[str]) -> list[str]:
    """Return those of the names that are caption tables."""
    return [name for name in names if name.endswith(".parquet")]
