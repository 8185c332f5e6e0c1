"""Decisions → ledger tables, on workers; only those that changed

    ledger/unit-<unit>.parquet    one row for every input row of a unit, with its final outcome
    state/decisions/<hash>        decisions on the rows of many units, while their tables are being written

A unit of this job is a table. Its id ends with a hash of everything that decides the table's content, so after a
changed threshold only the tables whose rows are decided differently are written.

One process decides, since rows are compared with all others. It goes through the units one by one and holds only their
ids. Decisions that tables lack go into few files, of which each worker reads its units' bytes. Tables are written as a
whole: readers see one table of every row, with columns that compress well, and need not know of decisions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.dataset.damage import noted_damage
from capstan.pipeline.dataset.shards import LedgerEntry, sha256_of
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.records import FORMAT_VERSION, KEPT, LEDGER_SCHEMA, with_scores
from capstan.pipeline.score import registry
from capstan.pipeline.score.store import added, joined
from capstan.pipeline.select.decide import Decided
from capstan.pipeline.select.derived import derived_columns, derived_fields, identity
from capstan.pipeline.select.licenses import LICENSE, setting_of
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.pipeline.units import Job, Piece, Unit

_DECIDED = ("outcome", "reason", "detail", "shard")
_HANDED_OVER: Final = "state/decisions"
_FILE_BYTES: Final = 8 << 20  # of decisions in one file, about
_COMPRESSED = pa.ipc.IpcWriteOptions(compression="zstd")


def ledger_name(unit: str) -> str:
    """Return the name of the ledger table of an ingest unit."""
    return f"ledger/unit-{unit}.parquet"


class WriteLedger(Job):
    """The job that writes ledger tables. Its markers hold their entries in the manifest."""

    name = title = "ledger"

    def __init__(self, recipe: Recipe, storage: Storage, pinned: list[dict[str, Any]]) -> None:
        self.storage, self._scores = storage, registry.columns(recipe)
        metadata = {"capstan.scores": json.dumps(pinned, sort_keys=True)} if pinned else None
        self._license = setting_of(recipe)
        self._recipe = recipe
        more = [*derived_fields(recipe), *added(self._scores)]
        self._schema = with_scores(LEDGER_SCHEMA, more, metadata)
        self._content = fingerprint([FORMAT_VERSION, str(self._schema), pinned, *identity(recipe)])

    def units(self, decisions: Decided) -> list[Unit]:
        """Return a unit for every ingest unit, in order."""
        made = []
        for unit, start, stop in _with_rows(decisions):
            staged = {"table": unit.table, "rows": unit.rows, "scores": dict(unit.scores)}
            content = fingerprint([self._content, staged, sha256_of(_decided(decisions, start, stop))])
            made.append(Unit(f"{unit.unit}-{content}", {"unit": unit.unit, **staged}))
        return made

    def handed_over(self, wanted: list[Unit], decisions: Decided) -> list[Unit]:
        """Return the units with what their workers need: the place of the decisions on their rows.

        Decisions are written for those whose tables are not there. `forget` removes them.
        """
        done = self.markers.read()
        made, held, size = list[Unit](), list[tuple[Unit, bytes]](), 0
        for unit, (_, start, stop) in zip(wanted, _with_rows(decisions), strict=True):
            if unit.id in done:
                made.append(unit)
                continue
            data = _decided(decisions, start, stop)
            held.append((unit, data))
            size += len(data)
            if size >= _FILE_BYTES:
                made += self._hand_over(held)
                held, size = [], 0
        return made + self._hand_over(held)

    def _hand_over(self, held: list[tuple[Unit, bytes]]) -> list[Unit]:
        """Publish decisions in one file; return their units with their places in it."""
        if not held:
            return []
        whole = b"".join(data for _, data in held)
        name, start, made = f"{_HANDED_OVER}/{sha256_of(whole)[:32]}", 0, list[Unit]()
        self.storage.write(name, whole)
        for unit, data in held:
            place = {"file": name, "start": start, "stop": start + len(data), "sha256": sha256_of(data)}
            made.append(Unit(unit.id, {**unit.spec, "decided": place}))
            start += len(data)
        return made

    def forget(self) -> None:
        """Remove decisions that were handed over."""
        self.storage.delete(*self.storage.names(_HANDED_OVER))

    def forget_stale(self, wanted: list[Unit], others: Collection[str] = ()) -> None:
        """Remove the markers of tables that will be replaced, and of those that are lost or damaged.

        Those of `others` (names of tables) stay.
        """
        usable = set(self.storage.names("ledger")) - noted_damage(self.storage)
        ids, done = {unit.id for unit in wanted}, self.markers.read()
        stale = {id_ for id_, entry in done.items() if id_ not in ids and entry["name"] not in others}
        self.markers.forget(stale | {id_ for id_ in ids & done.keys() if _entry(done[id_]).table not in usable})

    def entries(self, wanted: list[Unit]) -> list[LedgerEntry]:
        """Return the manifest's entries of the tables that are written."""
        done = self.markers.read()
        return [_entry(done[unit.id]) for unit in wanted if unit.id in done]

    def licenses(self) -> dict[str, int]:
        """Return the number of kept rows by licence, the most frequent first; {} if the recipe names no licences."""
        total = Counter[str]()
        for facts in self.markers.read().values():
            total.update(facts.get("licenses", {}))
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Yield one piece: the table's entry in the manifest."""
        spec = unit.spec
        staged = Staged(spec["unit"], spec["table"], "", spec["rows"], tuple(spec["scores"].items()))
        rows, scored = self.storage.read_table(staged.table), joined(self.storage, staged, self._scores)
        decided = self._read(**spec["decided"])
        columns = {name: rows[name] for name in LEDGER_SCHEMA.names if name in rows.column_names}
        columns |= {name: decided[name] for name in ("outcome", "shard")}
        columns |= {name: pc.coalesce(decided[name], rows[name]) for name in ("reason", "detail")}
        columns |= {name: scored[name] for name in scored.column_names}
        counts: dict[str, int] = {}
        columns |= derived_columns(rows["extra"], self._recipe)
        if self._license is not None:
            counts = _count(columns[LICENSE.name].filter(pc.equal(columns["outcome"], KEPT)))
        data = parquet_bytes(pa.table([columns[name] for name in self._schema.names], schema=self._schema))
        self.storage.write(ledger_name(staged.unit), data)
        facts = {"name": f"unit-{staged.unit}", "rows": len(rows), "sha256": sha256_of(data)}
        yield facts | ({"licenses": counts} if counts else {})

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (entry,) = pieces
        return entry

    def _read(self, file: str, start: int, stop: int, sha256: str) -> pa.Table:
        """Return decisions that were handed over. Raises DamagedFile."""
        data = self.storage.read_range(file, start, stop)
        if sha256_of(data) != sha256:
            raise DamagedFile(self.storage.path(file), "its SHA-256 is not that of the decisions", "run it again")
        return pa.ipc.open_stream(data).read_all()


def _entry(facts: dict[str, Any]) -> LedgerEntry:
    return LedgerEntry(name=facts["name"], rows=facts["rows"], sha256=facts["sha256"])


def _count(values: pa.Array) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(values).to_pylist()}


def _with_rows(decisions: Decided) -> Iterator[tuple[Staged, int, int]]:
    """Yield the units with their first row, and the one after their last."""
    starts = decisions.starts
    return zip(decisions.units, starts, starts[1:], strict=False)


def _decided(decisions: Decided, start: int, stop: int) -> bytes:
    decided = pa.table(decisions.columns(start, stop))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, decided.schema, options=_COMPRESSED) as writer:
        writer.write_table(decided)
    return bytes(sink.getvalue())
