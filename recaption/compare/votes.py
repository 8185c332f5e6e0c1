"""Blind votes of people: which of two captions fits an image better

    captions/votes.parquet     key, a, b (two sides, a < b), winner (a | b | tie), who, when; sorted by a, b and key

A side is `original` or LAYER:SLOT. Which side is shown on the left follows from the key, and nothing shown tells which
layer it is. A pair has one vote per image. The file is small: it is read and replaced as a whole.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption import store
from capstan.recaption.compare.metrics import wins

FILE: Final = f"{store.ROOT}/votes.parquet"
ORIGINAL: Final = "original"
A, B, TIE = "a", "b", "tie"
SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("a", pa.string(), nullable=False),
        pa.field("b", pa.string(), nullable=False),
        pa.field("winner", pa.string(), nullable=False),
        pa.field("who", pa.string(), nullable=False),
        pa.field("when", pa.timestamp("ms", tz="UTC"), nullable=False),
    ]
)
_HINT: Final = "restore it from a copy, or delete it and vote again"

Sides = tuple[str, str]


@dataclass(frozen=True)
class Ballot:
    """An image, and the captions of both sides in the order in which they are shown."""

    key: str
    left: str
    right: str


def sides_of(storage: Storage) -> list[str]:
    """Return all sides that can be compared: `original`, then each slot of each layer."""
    layers = store.list_layers(storage)
    return [ORIGINAL, *(f"{one}:{slot}" for one in layers for slot in store.layer_recipe(storage, one)["slots"])]


def check_sides(storage: Storage, one: str, other: str) -> Sides:
    """Return two sides in the order in which they are stored. Raises RecipeError unless they are two that exist."""
    known = sides_of(storage)
    for side in (one, other):
        if side not in known:
            raise RecipeError("side", f"no captions {side!r}", f"use two of {', '.join(known)}")
    if one == other:
        raise RecipeError("side", f"{one} is named twice", "compare two different sides")
    return (one, other) if one < other else (other, one)


def ballots(dataset: Dataset, sides: Sides) -> Iterator[Ballot]:
    """Yield the images on which the two sides have different captions, in the dataset's order: that of hashes."""
    for shard in dataset.shard_names:
        table = dataset.table(shard, ["key", "sha256", "caption"])
        try:
            a, b = (_texts(dataset.storage, side, shard, table) for side in sides)
        except FileNotFoundError:
            continue  # this shard is not captioned yet
        for key in table["key"].to_pylist():
            if key in a and key in b and a[key] != b[key]:
                yield Ballot(key, *((a[key], b[key]) if a_is_left(sides, key) else (b[key], a[key])))


def _texts(storage: Storage, side: str, shard: str, table: pa.Table) -> dict[str, str]:
    if side == ORIGINAL:
        texts = zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True)
        return {key: text for key, text in texts if text}
    layer, _, slot = side.partition(":")
    found = store.read_layer(storage, layer, shard, table)
    return {key: slots[slot] for key, slots in found.items() if slot in slots}


def a_is_left(sides: Sides, key: str) -> bool:
    """Return whether side a is shown on the left for an image: as if by a coin, and always the same."""
    return bool(hashlib.blake2b(" ".join([*sides, key]).encode(), digest_size=1).digest()[0] & 1)


def winner_of(sides: Sides, key: str, choice: str) -> str:
    """Return the winner that `choice` names: left, right, tie, or "" for no vote. Raises RecipeError for others."""
    left, right = (A, B) if a_is_left(sides, key) else (B, A)
    winners = {"left": left, "right": right, "tie": TIE, "": ""}
    if choice not in winners:
        raise RecipeError("choice", f"{choice!r} is unknown", "use left, right, tie or an empty text")
    return winners[choice]


def read_votes(storage: Storage) -> pa.Table:
    """Return the votes (SCHEMA); none if there are none yet. Raises DamagedFile if the file does not hold votes."""
    try:
        table = storage.read_table(FILE)
    except FileNotFoundError:
        return SCHEMA.empty_table()
    if table.schema.names != SCHEMA.names or table.schema.types != SCHEMA.types:
        raise DamagedFile(storage.path(FILE), f"its columns are not {', '.join(SCHEMA.names)}", _HINT)
    return table


def write_votes(storage: Storage, table: pa.Table) -> None:
    """Publish the votes (SCHEMA)."""
    storage.write_table(FILE, table.cast(SCHEMA))


def changed(
    table: pa.Table, sides: Sides, key: str, winner: str, who: str, when: datetime.datetime | None = None
) -> pa.Table:
    """Return the votes with another one on an image and pair; "" takes it back."""
    now = (when or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
    same = pc.and_(_of(table, sides), pc.equal(table["key"], key))
    row = {"key": key, "a": sides[0], "b": sides[1], "winner": winner, "who": who, "when": now}
    both = [table.filter(pc.invert(same)).cast(SCHEMA), pa.Table.from_pylist([row] if winner else [], SCHEMA)]
    return pa.concat_tables(both).sort_by([(name, "ascending") for name in ("a", "b", "key")])


def _of(table: pa.Table, sides: Sides) -> pa.ChunkedArray:
    return pc.and_(pc.equal(table["a"], sides[0]), pc.equal(table["b"], sides[1]))


def voted(table: pa.Table, sides: Sides) -> Collection[str]:
    """Return the keys of the images on which a pair has a vote."""
    return set(table.filter(_of(table, sides))["key"].to_pylist())


def results(table: pa.Table) -> list[dict[str, Any]]:
    """Return {a, b, a_wins, b_wins, ties, rate, low, high} of each pair.

    `rate` is how often a wins, ties half, with Wilson's 95% interval.
    """
    counted: dict[Sides, dict[str, int]] = {}
    for a, b, winner in zip(*(table[name].to_pylist() for name in ("a", "b", "winner")), strict=True):
        votes = counted.setdefault((a, b), {A: 0, B: 0, TIE: 0})
        votes[winner] += 1
    return [
        {"a": a, "b": b, "a_wins": votes[A], "b_wins": votes[B], "ties": votes[TIE], **_rate(votes)}
        for (a, b), votes in sorted(counted.items())
    ]


def _rate(votes: dict[str, int]) -> dict[str, Any]:
    won = np.repeat(np.array([1, -1, 0], np.float32), [votes[A], votes[B], votes[TIE]])
    return wins(won, np.zeros_like(won))
