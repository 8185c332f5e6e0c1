"""Files of a dataset → what is wrong with each, on the unit map; and keys that several shards hold"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.parts import part_fields
from capstan.pipeline.dataset.shards import MANIFEST, LedgerEntry, Manifest, ShardEntry
from capstan.pipeline.pack.verify_derived import file_problem
from capstan.pipeline.pack.verify_shard import check_shard, check_table, file_sha256
from capstan.pipeline.records import KEPT, LEDGER_SCHEMA, SHARD_SCHEMA, with_scores
from capstan.pipeline.score.store import pinned_columns
from capstan.pipeline.select.derived import fields_of, parts_of_manifest
from capstan.pipeline.source.planning.batches import batch_problem
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Unit, report, results

_TOGETHER: Final = {"shard": 1, "ledger": 16, "staged": 2, "batch": 1, "derived": 8}  # items of a unit, by kind
_SHARDS: Final = 64  # whose keys a worker compares with each other
_ABOVE: Final = "g"  # above all keys, which are hexadecimal


@dataclass
class Checked:
    """What a worker found in one file, or in one shard.

    `rows` is the number of rows of its table, `first` and `last` its least and greatest key, and `repeats` how many
    rows have a key of another row. `sums` has the sum of the keys in each shard, whatever their order.
    """

    problems: list[str] = field(default_factory=list)
    rows: int = 0
    first: str = ""
    last: str = ""
    repeats: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)


class _Step(Job):
    """A job that reads the dataset `dataset` and writes nothing there: its markers are in `state`, of the driver."""

    def __init__(self, dataset: Storage, state: Storage) -> None:
        self.dataset, self.storage = dataset, state

    def check_storage(self) -> None:
        self.dataset.check_reachable()

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (facts,) = pieces
        return facts


class Verify(_Step):
    """The job that checks files. A unit is a shard, or a few smaller files."""

    name = title = "verify"

    def __init__(self, dataset: Storage, state: Storage, manifest: Manifest) -> None:
        super().__init__(dataset, state)
        more = [*fields_of(manifest.recipe), *pinned_columns(manifest.scores)]
        self._shard_schema = with_scores(SHARD_SCHEMA, [*more, *part_fields(parts_of_manifest(manifest.recipe))])
        self._ledger_schema = with_scores(LEDGER_SCHEMA, more)

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Yield one piece: what was found in each of the unit's `items`, and counts for the display."""
        found, counts = list[Checked](), Counter[str]()
        for item in unit.spec["items"]:
            found.append(self._check(unit.spec["kind"], item))
            more = {"problems": len(found[-1].problems)}
            if unit.spec["kind"] == "shard":
                more |= {"samples": item["samples"], "bytes": item["bytes"]}
            report(more)
            counts.update(more)
        yield {"found": [asdict(one) for one in found], **counts}

    def _check(self, kind: str, item: Any) -> Checked:
        if kind == "shard":
            return self._shard(ShardEntry(**item))
        if kind == "ledger":
            return self._ledger(LedgerEntry(**item))
        problem = {"staged": _staged_problem, "batch": batch_problem, "derived": file_problem}[kind](self.dataset, item)
        return Checked([] if problem is None else [problem])

    def _shard(self, entry: ShardEntry) -> Checked:
        keys, problems = check_shard(self.dataset, entry, self._shard_schema)
        found = Checked(problems, rows=len(keys), sums={entry.name: _sum(keys)})
        if len(keys):
            bounds = pc.min_max(keys)
            found.first, found.last = bounds["min"].as_py(), bounds["max"].as_py()
            found.repeats = len(keys) - pc.count_distinct(keys).as_py()
        return found

    def _ledger(self, entry: LedgerEntry) -> Checked:
        table, problems = check_table(self.dataset, entry.table, entry.sha256, self._ledger_schema)
        found = Checked(problems)
        if table is None:
            return found
        found.rows = len(table)
        if len(table) != entry.rows:
            problems.append(f"{entry.table}: {len(table)} rows, {MANIFEST} says {entry.rows}")
        found.outcomes = {one["values"]: one["counts"] for one in pc.value_counts(table["outcome"]).to_pylist()}
        kept = table.filter(pc.equal(table["outcome"], KEPT))
        for name in pc.unique(kept["shard"]).to_pylist():
            found.sums[name] = _sum(kept.filter(pc.equal(kept["shard"], name))["key"])
        return found


def _staged_problem(storage: Storage, name: str) -> str | None:
    """Return the problem of a staged file, whose name ends with the start of its SHA-256."""
    sha256 = file_sha256(storage, name)
    if sha256 is None:
        return f"{name}: missing"
    if not sha256.startswith(name.rpartition("-")[2].partition(".")[0]):
        return f"{name}: its SHA-256 is not the one in its name"
    return None


def _sum(keys: pa.ChunkedArray) -> int:
    """Return the sum of keys of 32 hexadecimal digits, with their count in the high bits."""
    words = np.frombuffer(bytes.fromhex("".join(keys.to_pylist())), ">u4").reshape(-1, 4)
    total = 0
    for part in [len(keys), *words.sum(axis=0, dtype=np.uint64).tolist()]:
        total = (total << 32) + part
    return total


def run_checks(
    dataset: Storage,
    state: Storage,
    manifest: Manifest,
    work: Mapping[str, Sequence[Any]],
    resources: Resources,
    progress: bool,
) -> dict[str, list[Checked]]:
    """Check the items of each kind in `work`; return what was found in each, in order."""
    units = [
        Unit(f"{kind}-{start:09d}", {"kind": kind, "items": part, "rows": _samples(kind, part)})
        for kind, items in work.items()
        for start in range(0, len(items), _TOGETHER[kind])
        if (part := list(items[start : start + _TOGETHER[kind]]))
    ]
    done = results(Verify(dataset, state, manifest), units, resources, progress=progress)
    found: dict[str, list[Checked]] = {kind: [] for kind in work}
    for unit, facts in zip(units, done, strict=True):
        found[unit.spec["kind"]] += [Checked(**one) for one in facts["found"]]
    return found


def _samples(kind: str, items: list[Any]) -> int:
    return sum(item["samples"] for item in items) if kind == "shard" else 0


# Keys ----------------------------------------------------------------------------------------------------------------


class Twice(_Step):
    """The job that looks for keys that occur twice. A unit is a range of keys, and the shards that may hold them."""

    name, title = "verify-keys", "verify: keys"

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Yield one piece: for each row whose key an earlier row has, [shard, row, key, earlier shard]."""
        low, high = unit.spec["range"]
        keys, shards, rows = list[pa.ChunkedArray](), list[Any](), list[Any]()
        for number, table in unit.spec["tables"]:
            held = self.dataset.read_table(table, ["key"])["key"]
            here = np.asarray(pc.and_(pc.greater_equal(held, low), pc.less(held, high)))
            keys.append(held.filter(pa.array(here)))
            rows.append(np.nonzero(here)[0])
            shards.append(np.full(len(rows[-1]), number))
        together = pa.chunked_array([chunk for held in keys for chunk in held.chunks], pa.string())
        counts = pc.value_counts(together)
        twice = pc.is_in(together, counts.field("values").filter(pc.greater(counts.field("counts"), 1)))
        places = np.nonzero(np.asarray(twice))[0]
        found, before = list[list[Any]](), dict[str, int]()
        for place, key in zip(places.tolist(), together.take(pa.array(places)).to_pylist(), strict=True):
            shard, row = int(np.concatenate(shards)[place]), int(np.concatenate(rows)[place])
            if key in before:
                found.append([shard, row, key, before[key]])
            before[key] = shard
        yield {"found": found}


def repeated_keys(
    dataset: Storage,
    state: Storage,
    manifest: Manifest,
    shards: Sequence[Checked],
    resources: Resources,
    progress: bool,
) -> list[str]:
    """Return a line for every key that occurs again. Only shards whose keys overlap are read: batches may, by chance.

    Shards of one batch follow each other in the order of keys.
    """
    tables = [entry.table for entry in manifest.shards]
    units = [
        Unit(f"{low or '0'}-{number}", {"range": [low, high], "tables": [[one, tables[one]] for one in members]})
        for number, (low, high, members) in enumerate(overlapping(shards))
    ]
    done = results(Twice(dataset, state), units, resources, progress=progress and bool(units))
    found = sorted(tuple(one) for facts in done for one in facts["found"])
    return [f"{tables[shard]}: key {key} is also in {tables[other]}" for shard, _, key, other in found]


def overlapping(shards: Sequence[Checked], most: int = _SHARDS) -> Iterator[tuple[str, str, list[int]]]:
    """Yield ranges of keys [low, high) and the shards (at least two, or one that repeats a key) with keys in them.

    About `most` shards begin in a range.
    """
    order = sorted((number for number, one in enumerate(shards) if one.rows), key=lambda number: shards[number].first)
    group = list[int]()  # shards that overlap each other, directly or through others
    end = ""
    for number in [*order, None]:
        if number is None or (group and shards[number].first > end):
            if len(group) > 1 or any(shards[one].repeats for one in group):
                yield from _cut(shards, group, most)
            group, end = [], ""
        if number is not None:
            group.append(number)
            end = max(end, shards[number].last)


def _cut(shards: Sequence[Checked], group: list[int], most: int) -> Iterator[tuple[str, str, list[int]]]:
    """Cut the range of keys of a group, which is sorted by first keys."""
    lows = sorted({shards[group[start]].first for start in range(0, len(group), most)})
    reaching = list[int]()  # shards that began before the range and may reach into it
    at = 0
    for low, high in zip(lows, [*lows[1:], _ABOVE], strict=True):
        reaching = [one for one in reaching if shards[one].last >= low]
        while at < len(group) and shards[group[at]].first < high:
            reaching.append(group[at])
            at += 1
        yield low, high, sorted(reaching)
