"""Duplicates of a dataset: pairs of a dropped row and the row that was kept, by distance, and what people said of them

The distance is the number of bits in which the perceptual hashes differ, whatever found the pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.records import DUPLICATE
from capstan.pipeline.report.explore import Explorer
from capstan.pipeline.report.query import Row, literal
from capstan.pipeline.select import pairs
from capstan.pipeline.select.hash_pairs import HASH_BITS
from capstan.pipeline.select.near_duplicates import CONTAMINATED, REASONS

MOST_PAIRS: Final = 100_000  # that are judged together
MOST_MEMBERS: Final = 60  # of a group, that a page shows
NOT_JUDGED: Final = "none"
_JUDGED: Final = "judged"
_PAIRS: Final = f"""
    SELECT d.key AS key, d.detail AS kept, d.reason AS reason, bit_count(xor(d.phash, k.phash)::HUGEINT) AS distance,
        coalesce(j.verdict, '{NOT_JUDGED}') AS verdict
    FROM (SELECT * FROM rows WHERE outcome = '{DUPLICATE}' AND reason <> '{REASONS[CONTAMINATED]}') d
    JOIN rows k ON k.key = d.detail
    LEFT JOIN {_JUDGED} j ON j.a = least(d.key, d.detail) AND j.b = greatest(d.key, d.detail)
"""


@dataclass(frozen=True)
class Chosen:
    """Which pairs: of a reason ("": any), from `low` to `high` bits apart, with a verdict ("": any, or none)."""

    reason: str = ""
    low: int = 0
    high: int = HASH_BITS
    verdict: str = ""

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> Chosen:
        """Return what a page asks for. Raises RecipeError for what does not exist."""
        reason, verdict = str(asked.get("reason", "")), str(asked.get("verdict", ""))
        if reason not in REASONS:
            raise RecipeError("reason", f"{reason!r} is unknown", f"use one of {', '.join(REASONS[1:])}")
        if verdict not in ("", NOT_JUDGED, *pairs.VERDICTS):
            raise RecipeError("verdict", f"{verdict!r} is unknown", f"use {NOT_JUDGED}, {', '.join(pairs.VERDICTS)}")
        try:
            return cls(reason, int(asked.get("low", 0)), int(asked.get("high", HASH_BITS)), verdict)
        except (TypeError, ValueError):
            raise RecipeError("distance", "is not a number", "use whole numbers of bits") from None

    @property
    def sql(self) -> str:
        terms = [f"distance BETWEEN {self.low} AND {self.high}"]
        terms += [f"reason = {literal(self.reason)}"] if self.reason else []
        terms += [f"verdict = {literal(self.verdict)}"] if self.verdict else []
        return " AND ".join(terms)


@dataclass(frozen=True)
class Member:
    """A row that repeats the kept row of its group."""

    key: str
    reason: str
    distance: int
    verdict: str


@dataclass(frozen=True)
class Group:
    """A kept row and rows that repeat it, the nearest first; `more` of them are not listed."""

    kept: str
    members: list[Member]
    more: int = 0


def counts(explorer: Explorer, judged: pa.Table, verdict: str) -> list[dict[str, Any]]:
    """Return {reason, distance, pairs} for the pairs with a verdict ("": any, or none)."""
    where = Chosen(verdict=verdict).sql
    query = f"SELECT reason, distance, count(*) FROM ({_PAIRS}) WHERE {where} GROUP BY ALL ORDER BY ALL"
    found = explorer.ask("duplicates", query, tables={_JUDGED: judged})
    return [{"reason": reason, "distance": distance, "pairs": count} for reason, distance, count in found]


def groups(
    explorer: Explorer, judged: pa.Table, chosen: Chosen, after: str = "", limit: int = 24
) -> tuple[list[Group], str]:
    """Return groups of the chosen pairs, by the key of their kept row, and where the next page starts ("": the end)."""
    where, tables = f"({_PAIRS}) WHERE {chosen.sql}", {_JUDGED: judged}
    query = f"SELECT kept FROM {where} AND kept > ? GROUP BY kept ORDER BY kept LIMIT {limit}"
    kept = [key for (key,) in explorer.ask("duplicates", query, [after], tables)]
    if not kept:
        return [], ""
    among = ", ".join(map(literal, kept))
    where += f" AND kept IN ({among}) ORDER BY kept, distance, key"
    query = f"SELECT kept, key, reason, distance, verdict FROM {where}"
    found = itertools.groupby(explorer.ask("duplicates", query, tables=tables), key=lambda row: row[0])
    listed = [(key, [Member(*row[1:]) for row in rows]) for key, rows in found]
    shown = [Group(key, members[:MOST_MEMBERS], max(0, len(members) - MOST_MEMBERS)) for key, members in listed]
    return shown, kept[-1] if len(kept) == limit else ""


def remembered(explorer: Explorer, judged: pa.Table, after: str = "", limit: int = 24) -> tuple[list[Group], str]:
    """Return the pairs that are different as groups, whatever the ledger says of them now; by the first key of each."""
    different = judged.filter(pc.and_(pc.equal(judged["verdict"], pairs.DIFFERENT), pc.greater(judged["a"], after)))
    first = pc.unique(different["a"]).slice(0, limit).to_pylist()
    chosen = different.filter(pc.is_in(different["a"], pa.array(first, pa.string()))).to_pylist()
    rows = explorer.rows_of(key for row in chosen for key in (row["a"], row["b"]))
    found = []
    for key, members in itertools.groupby(chosen, key=lambda row: str(row["a"])):
        there = [row["b"] for row in members if row["a"] in rows and row["b"] in rows]
        shown = [Member(b, "", _distance(rows[key], rows[b]), pairs.DIFFERENT) for b in there[:MOST_MEMBERS]]
        found += [Group(key, shown, max(0, len(there) - MOST_MEMBERS))] if shown else []
    return found, first[-1] if len(first) == limit else ""


def _distance(one: Row, other: Row) -> int:
    return (one.phash ^ other.phash).bit_count()


def all_pairs(explorer: Explorer, judged: pa.Table, chosen: Chosen, *, among_copies: bool) -> list[pairs.Pair]:
    """Return all chosen pairs; with `among_copies`, also those of two chosen rows that repeat the same one.

    If only the pairs with the kept row were marked as different, its copies would repeat each other instead. Raises
    RecipeError for too many.
    """
    query = f"SELECT kept, key FROM ({_PAIRS}) WHERE {chosen.sql} ORDER BY ALL LIMIT {MOST_PAIRS + 1}"
    found = explorer.ask("duplicates", query, tables={_JUDGED: judged})
    chosen_pairs: list[pairs.Pair] = []
    for kept, rows in itertools.groupby(found, key=lambda row: str(row[0])):
        copies = [str(key) for _, key in rows]
        chosen_pairs += within([kept, *copies]) if among_copies else [pairs.pair(kept, key) for key in copies]
        if len(chosen_pairs) > MOST_PAIRS:
            raise RecipeError("pairs", f"are more than {MOST_PAIRS:,}", "choose fewer, by distance or reason")
    return chosen_pairs


def within(keys: Sequence[str]) -> Iterator[pairs.Pair]:
    """Yield all pairs of rows among `keys`, `MOST_PAIRS` and one at most."""
    both = (pairs.pair(one, other) for one, other in itertools.combinations(keys, 2))
    return itertools.islice(both, MOST_PAIRS + 1)
