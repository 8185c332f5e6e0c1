"""Planned units → staged images and measurements: fetch, decode, measure.

    staged/<unit>-<hash>.parquet   STAGED_SCHEMA, one row per planned row, in the same order
    staged/<unit>-<hash>.tar       the images, KEY.jpg, in the same order, but for those that the rows refer to
                                   (pipeline.ingest.references)

A unit may be processed again for the rows that failed (pipeline.ingest.retry_rows). The other rows are carried over
from its files.

Both files are named by their content and published by the worker. They count only once the unit's marker names them.
A unit that is interrupted, or processed by a worker that was given up, leaves files that nobody reads; `clean` removes
them.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.dataset.own_shards import measured
from capstan.pipeline.dataset.parts import PARTS, part_columns, part_fields, part_names, read_parts
from capstan.pipeline.dataset.shards import Place, Sample, read_image, sha256_of, write_samples
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.fetch.host_limits import HostLimits
from capstan.pipeline.image.copied import copy_or_decode
from capstan.pipeline.image.decode import Failure, StoredImage, decode
from capstan.pipeline.ingest.guarded import DECODE_S, Decoder, guarded
from capstan.pipeline.ingest.references import REFERENCE, REFERENCE_NAMES, merged, refer, taken_over, with_references
from capstan.pipeline.ingest.retry_rows import matches
from capstan.pipeline.ingest.row_bytes import read_rows, read_sample_parts
from capstan.pipeline.records import CRC32, FORMAT_VERSION, MEASURED, REMOVED, storable
from capstan.pipeline.secrets import public_text, public_url
from capstan.pipeline.source.blocklist import blocked
from capstan.pipeline.source.planning.batches import PlannedUnit
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units import Job, Piece, Unit, report

log = logging.getLogger(__name__)

# `reason` is "" for a row whose image is staged, REMOVED for a row that is blocked or was taken down, else the reason
# of its failure. `offset` and `size` locate its JPEG in the staged tar (0 if it was freed since).
STAGED_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        *MEASURED,
        pa.field("extra", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        CRC32,
    ]
)

_LONGEST_DETAIL: Final = 1_000  # characters
Outcome = dict[str, Any]  # `reason`, `detail` and MEASURED of one row
_STAGED_OUTCOME = ["reason", "detail", *(field.name for field in MEASURED), "offset", "size", CRC32.name]


@dataclass(frozen=True)
class Staged:
    """The content of a unit's marker: the names of its table and its tar ("" if it has no images), and its row count.

    `scores` holds (scorer's name, file) for each scorer. `freed`: some of the rows' images are not in a staged tar:
    they were removed, or are in the source's tars (pipeline.ingest.staging).
    """

    unit: str
    table: str
    tar: str
    rows: int
    scores: tuple[tuple[str, str], ...] = ()
    freed: bool = False


class Ingest(Job):
    """Job that fetches, decodes and stages units. Staged images depend on `image`, so its hash is in the job's name."""

    title = "ingest"
    decode_s: float = DECODE_S

    def __init__(self, recipe: Recipe, storage: Storage, resolve: Mapping[str, str] | None = None) -> None:
        self.recipe, self.storage, self.resolve = recipe, storage, dict(resolve or {})
        self.name = f"ingest-{fingerprint([FORMAT_VERSION, recipe.image.model_dump(mode='json')])}"

    @staticmethod
    def units(planned: Iterable[PlannedUnit]) -> list[Unit]:
        return [Unit(unit.id, {"table": unit.table, "rows": unit.rows}) for unit in planned]

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Yield one piece: the unit's marker."""
        planned = self.storage.read_table(unit.spec["table"])
        known, table, tar = np.zeros(len(planned), bool), None, ""
        if self._refers and "again" not in unit.spec:
            known, table = taken_over(planned, self.recipe, blocked(self.recipe, self.storage), unit.id)
            report({"samples": int(known.sum()), "bytes": 0 if table is None else pc.sum(table["bytes"]).as_py()})
        if table is None or not known.all():
            read, tar = self._staged(unit, planned.filter(pa.array(~known)).to_pylist())
            table = read if table is None else merged(table, read, known)
        else:
            table = table.select([*STAGED_SCHEMA.names, *REFERENCE_NAMES]).cast(pa.schema([*STAGED_SCHEMA, *REFERENCE]))
        data = parquet_bytes(table)
        table_name = f"staged/{unit.id}-{sha256_of(data)[:16]}.parquet"
        self.storage.write(table_name, data)
        mark: Piece = {"table": table_name, "tar": tar, "rows": len(table), **_counts(table["reason"].to_pylist())}
        elsewhere = pc.and_(pc.equal(table["reason"], ""), pc.equal(table["size"], 0))
        mark |= {"freed": True} if pc.any(elsewhere).as_py() else {}
        yield mark | ({"round": unit.spec["again"]["round"]} if "again" in unit.spec else {})

    def _staged(self, unit: Unit, rows: list[dict[str, Any]]) -> tuple[pa.Table, str]:
        """Read the rows' images and publish those to be copied; return the staged table, and the tar's name or ""."""
        with scratch() as folder, _Spool(folder) as spool:
            kept = self._kept(unit, rows, spool)
            left = [index for index in range(len(rows)) if index not in kept]
            with guarded(self.decoder(), is_retry=unit.is_retry, seconds=self.decode_s) as decoder:
                fresh = self._outcomes([rows[index] for index in left], spool.only(left), decoder)
            fresh = self._with_parts([rows[index] for index in left], fresh, spool.only(left))
            by_index = kept | dict(zip(left, fresh, strict=True))
            outcomes = [by_index[index] for index in range(len(rows))]
            digest = hashlib.sha256()
            tar = folder / "staged.tar"
            written = write_samples(tar, spool.samples([row["key"] for row in rows]), digest)
            tar_name = f"staged/{unit.id}-{digest.hexdigest()[:16]}.tar" if written else ""
            if written:
                self.storage.put(tar, tar_name)
            places = dict(zip(spool.indices, written, strict=True))
        table = _table(rows, outcomes, places, unit.id, self._parts)
        return with_references(table, outcomes), tar_name

    @property
    def _refers(self) -> bool:
        """Whether images may stay in the source's tars."""
        return self.recipe.image.check == "header" and not self._parts

    @property
    def _parts(self) -> list[str]:
        """The parts of samples that are carried, in the order of tars."""
        wanted = (self.recipe.source.parts if self.recipe.source is not None else None) or []
        return [part for part in PARTS if part in wanted]

    def _with_parts(self, rows: list[dict[str, Any]], outcomes: list[Outcome], spool: _Spool) -> list[Outcome]:
        """Add the parts of the rows' samples to the spool; return the outcomes, some of which now are failures."""
        if not self._parts:
            return outcomes
        outcomes = list(outcomes)
        there = set(spool.indices)
        for index, found in read_sample_parts(rows, self.recipe, self._parts):
            if index in there and isinstance(found, Failure):
                outcomes[index] = _failed(found.reason, found.detail)
                spool.drop(index)
            elif index in there and isinstance(found, dict):
                spool.add_parts(index, found)
        return outcomes

    def shared(self) -> HostLimits:
        """Return what workers have to know together of the hosts."""
        return HostLimits(self.recipe.fetch.per_host)

    def decoder(self) -> Decoder:
        """Return the function that decodes a source file's bytes; pickled for a child process in a unit's retries."""
        how = copy_or_decode if self.recipe.image.check == "header" else decode
        return functools.partial(how, image=self.recipe.image, noai=self.recipe.fetch.noai)

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (marker,) = pieces
        return marker

    def _kept(self, unit: Unit, rows: list[dict[str, Any]], spool: _Spool) -> dict[int, Outcome]:
        """Return the outcomes, by index, that a unit processed again keeps; copy their images to the spool.

        Images that were freed are not copied.
        """
        if "again" not in unit.spec:
            return {}
        again = unit.spec["again"]
        table = self.storage.read_table(again["table"])
        assert table["key"].to_pylist() == [row["key"] for row in rows], f"{again['table']} belongs to another plan"
        carried = _STAGED_OUTCOME if again.get("reread") else (*_STAGED_OUTCOME, *REFERENCE_NAMES)
        names = [name for name in carried if name in table.column_names] + part_names(table.column_names)
        before = dict(enumerate(table.select(names).to_pylist()))
        wanted = set(again.get("keys", ()))  # rows whose images were freed
        kept = {
            index: row
            for index, row in before.items()
            if not matches(row["reason"], again["reasons"]) and rows[index]["key"] not in wanted
        }
        with self.storage.open(again["tar"]) if again["tar"] else io.BytesIO() as tar:
            for index, row in kept.items():
                offset, size, crc32 = row.pop("offset"), row.pop("size"), row.pop(CRC32.name, None)
                parts = {name: row.pop(name) for name in part_names(row)}
                if row["reason"] or not size or not again["tar"]:
                    continue
                try:
                    jpeg = read_image(tar, offset, size, crc32, again["tar"])
                    spool.add_parts(index, read_parts(tar, parts, again["tar"]))
                    spool.add(index, jpeg)
                except DamagedFile as error:  # the image counts as freed
                    log.warning("%s, row %s", error, rows[index]["key"])
        if "packed" in again:
            self._restore(again, kept, spool)
        return kept

    def _restore(self, again: dict[str, Any], kept: dict[int, Outcome], spool: _Spool) -> None:
        """Add to the spool what only packed shards hold; with `refetch`, rows whose image is nowhere are done again."""
        from capstan.pipeline.ingest.staging import samples

        found = set(spool.indices)
        gone = [index for index, row in kept.items() if not row["reason"] and not row.get("source")]
        missing = [index for index in gone if index not in found]
        packed = [(tar, table) for tar, table in again["packed"]]
        found_again = samples(self.storage, again["table"], "", missing, packed, damaged_is_none=True, refer=False)
        for index, stored in found_again:
            if stored is not None:
                spool.add(index, stored.jpeg)
                spool.add_parts(index, stored.parts)
            elif again["refetch"]:
                del kept[index]

    def _outcomes(self, rows: list[dict[str, Any]], spool: _Spool, decoder: Decoder) -> list[Outcome]:
        """Return the outcome of each row. JPEGs go to the spool, so that memory does not grow with the unit."""
        outcomes: list[Outcome] = [{}] * len(rows)
        unwanted = blocked(self.recipe, self.storage)
        for index, data in read_rows(rows, self.recipe, self.resolve):
            result = decoder(data) if isinstance(data, bytes) else data
            if isinstance(result, StoredImage) and isinstance(data, bytes):
                result, size = _with_facts(result, rows[index].get("facts"), data)
            if isinstance(result, StoredImage) and result.sha256 not in unwanted.sha256:
                outcomes[index] = _measured(result, size)
                if self._refers and data == result.jpeg and (place := refer(rows[index], result.jpeg)):
                    outcomes[index] |= place
                else:
                    spool.add(index, result.jpeg)
            elif isinstance(result, StoredImage):
                outcomes[index] = _failed(REMOVED, "")
            else:
                outcomes[index] = _failed(result.reason, result.detail)
            _report(outcomes[index])
        assert all(outcomes), "a row has no outcome"
        return outcomes


class _Spool:
    """JPEGs on the local disk, written as they arrive and readable in any order."""

    def __init__(self, folder: Path) -> None:
        self._path, self._spans = folder / "pictures", dict[int, tuple[int, int]]()
        self._parts = dict[int, dict[str, tuple[int, int]]]()
        self._numbers: list[int] | None = None

    def __enter__(self) -> _Spool:
        self._file = self._path.open("w+b")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, index: int, jpeg: bytes) -> None:
        number = index if self._numbers is None else self._numbers[index]
        self._spans[number] = (self._file.tell(), len(jpeg))
        self._file.write(jpeg)

    def add_parts(self, index: int, parts: Mapping[str, bytes]) -> None:
        """Add the other files of a row's sample."""
        number = index if self._numbers is None else self._numbers[index]
        for suffix, data in parts.items():
            self._parts.setdefault(number, {})[suffix] = (self._file.tell(), len(data))
            self._file.write(data)

    def drop(self, index: int) -> None:
        """Forget the image of a row."""
        del self._spans[index if self._numbers is None else self._numbers[index]]

    def only(self, numbers: list[int]) -> _Spool:
        """Return the same spool for a subset of the rows, numbered from 0."""
        part = copy.copy(self)
        part._numbers = numbers
        return part

    @property
    def indices(self) -> list[int]:
        """Rows that have an image, in order."""
        if self._numbers is None:
            return sorted(self._spans)
        return [index for index, number in enumerate(self._numbers) if number in self._spans]

    def samples(self, keys: list[str]) -> Iterator[Sample]:
        """Yield the images in the order of their rows; `keys` holds the keys of all rows."""
        for index in self.indices:
            parts = {suffix: self._read(*span) for suffix, span in self._parts.get(index, {}).items()}
            yield Sample(keys[index], self._read(*self._spans[index]), parts=parts)

    def _read(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        return self._file.read(size)


def failed_table(rows: pa.Table, unit: str, reason: str, detail: str) -> pa.Table:
    """Build a table of STAGED_SCHEMA for planned rows that all failed for one reason."""
    listed = rows.select(["key", "url", "caption", "extra"]).to_pylist()
    return _table(listed, [_failed(reason, detail)] * len(listed), {}, unit)


def _with_facts(image: StoredImage, facts: str | None, data: bytes) -> tuple[StoredImage, int]:
    """Return the image and the size of its source, as they were measured when a shard's table was made of `facts`.

    An image that is not stored as it was there has been measured itself.
    """
    known = measured(facts, zlib.crc32(data)) if facts and image.jpeg == data else None
    if known is None:
        return image, len(data)
    size = known.pop("bytes")
    return replace(image, **known), size


def _measured(image: StoredImage, source_bytes: int) -> Outcome:
    measures = {field.name: getattr(image, field.name) for field in MEASURED if field.name != "bytes"}
    return {"reason": "", "detail": "", "bytes": source_bytes, **measures}


def _failed(reason: str, detail: str) -> Outcome:
    nothing = {field.name: "" if field.type == pa.string() else 0 for field in MEASURED}
    detail = public_text(detail)
    cut = detail if len(detail) <= _LONGEST_DETAIL else f"{detail[: _LONGEST_DETAIL - 1]}…"
    return {"reason": reason, "detail": storable(cut), **nothing}


def _table(
    rows: list[dict[str, Any]],
    outcomes: list[Outcome],
    places: Mapping[int, Place],
    unit: str,
    parts: Sequence[str] = (),
) -> pa.Table:
    """Build a table of STAGED_SCHEMA, and columns of `parts`; `places` holds the rows that have an image."""
    records = []
    for index, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        place = places.get(index, Place(0, 0, 0, None))
        source = {name: row[name] for name in ("key", "url", "caption", "extra")} | {"url": public_url(row["url"])}
        records.append({**source, **outcome, "unit": unit, "offset": place.offset, "size": place.size})
        records[-1][CRC32.name] = place.crc32
    table = pa.Table.from_pylist(records, schema=STAGED_SCHEMA)
    found = [places[index].parts if index in places else {} for index in range(len(rows))]
    for field, column in zip(part_fields(parts), part_columns(found, parts).values(), strict=True):
        table = table.append_column(field, column)
    return table


def _counts(found: list[str]) -> dict[str, int]:
    reasons = Counter(reason for reason in found if reason not in ("", REMOVED))
    return {"failed": sum(reasons.values()), **{f"failed.{reason}": n for reason, n in sorted(reasons.items())}}


def _report(outcome: Outcome) -> None:
    counts = {"samples": 1, "bytes": outcome["bytes"]}
    if outcome["reason"] not in ("", REMOVED):
        counts[f"failed.{outcome['reason']}"] = 1
    report(counts)


def staged(marks: Mapping[str, Mapping[str, Any]]) -> dict[str, Staged]:
    """Parse the markers of an ingest job, by unit. Raises DamagedFile for one that lacks what ingest writes."""
    units = {}
    for unit, mark in marks.items():
        try:
            units[unit] = Staged(unit, mark["table"], mark["tar"], mark["rows"], freed=mark.get("freed", False))
        except KeyError as error:
            hint = "remove this file and run `capstan build` again: the unit is done again"
            raise DamagedFile(f"state/ingest-…/done/{unit}.json", f"it has no {error}", hint) from None
    return units


def clean(job: Ingest, kept: Iterable[Staged]) -> None:
    """Remove staged files that no marker of `job` names, and markers of ingest jobs with other image settings."""
    wanted = {name for unit in kept for name in (unit.table, unit.tar)}
    others = [name for name in job.storage.names("state") if name.startswith("state/ingest-")]
    others = [name for name in others if not name.startswith(f"state/{job.name}/")]
    # Logs first: a log without its newer markers may name files that are gone.
    job.storage.delete(*(name for name in others if name.endswith("/log.json")))
    job.storage.delete(*(name for name in others if not name.endswith("/log.json")))
    job.storage.delete(*(name for name in job.storage.names("staged") if name not in wanted))
