"""Verdicts of people on pairs of rows that deduplication compares

    pairs/verdicts.parquet     a, b (two keys, a < b), verdict (different | same), who, when; sorted by a and b

They are given in `capstan view`. From then on, neither row of a pair that is `different` is a duplicate of the other;
`same` only says that somebody has looked. The file is small: it is read and replaced as a whole.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import fingerprint
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.select.arrays.apart import NOTHING, Apart
from capstan.pipeline.select.arrays.large_arrays import which
from capstan.pipeline.storage import Storage

FOLDER: Final = "pairs"
FILE: Final = f"{FOLDER}/verdicts.parquet"
DIFFERENT, SAME = "different", "same"
VERDICTS: Final = (DIFFERENT, SAME)
SCHEMA: Final = pa.schema(
    [
        pa.field("a", pa.string(), nullable=False),
        pa.field("b", pa.string(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("who", pa.string(), nullable=False),
        pa.field("when", pa.timestamp("ms", tz="UTC"), nullable=False),
    ]
)
_KEY: Final = r"^[0-9a-f]{32}$"
_HINT: Final = "restore it from a copy, or delete it and judge the pairs again"

Pair = tuple[str, str]


def pair(one: str, other: str) -> Pair:
    """Return two keys in the order in which they are stored."""
    return (one, other) if one < other else (other, one)


def read_pairs(storage: Storage) -> pa.Table:
    """Return the verdicts (SCHEMA); none if there is no file. Raises DamagedFile if it does not hold verdicts."""
    try:
        table = storage.read_table(FILE)
    except FileNotFoundError:
        return SCHEMA.empty_table()
    if problem := _problem(table):
        raise DamagedFile(storage.path(FILE), problem, _HINT)
    return table


def write_pairs(storage: Storage, table: pa.Table) -> None:
    """Publish the verdicts (SCHEMA)."""
    storage.write_table(FILE, table.cast(SCHEMA).sort_by([("a", "ascending"), ("b", "ascending")]))


def among(table: pa.Table, keys: list[str]) -> dict[Pair, str]:
    """Return pair → verdict for the pairs of which both rows are among `keys`."""
    wanted = pa.array(keys, pa.string())
    found = table.filter(pc.and_(pc.is_in(table["a"], wanted), pc.is_in(table["b"], wanted)))
    return {(row["a"], row["b"]): row["verdict"] for row in found.to_pylist()}


def changed(table: pa.Table, verdicts: Mapping[Pair, str], who: str, when: datetime.datetime | None = None) -> pa.Table:
    """Return the verdicts with other ones on the pairs of `verdicts`; "" takes a pair out."""
    now = (when or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
    given = [
        {"a": a, "b": b, "verdict": verdict, "who": who, "when": now} for (a, b), verdict in verdicts.items() if verdict
    ]
    places = pc.binary_join_element_wise(table["a"], table["b"], " ")
    same = pc.is_in(places, pa.array([" ".join(one) for one in verdicts], pa.string()))
    both = pa.concat_tables([table.filter(pc.invert(same)).cast(SCHEMA), pa.Table.from_pylist(given, SCHEMA)])
    return both.sort_by([("a", "ascending"), ("b", "ascending")])


def without(table: pa.Table, keys: pa.Array) -> pa.Table:
    """Return the verdicts in which none of `keys` occurs."""
    return table.filter(pc.invert(pc.or_(pc.is_in(table["a"], keys), pc.is_in(table["b"], keys))))


# What deduplication honours --------------------------------------------------------------------------------------


def _different(storage: Storage) -> pa.Table:
    table = read_pairs(storage)
    return table.filter(pc.equal(table["verdict"], DIFFERENT)).select(["a", "b"])


def pairs_signature(storage: Storage) -> str:
    """Return a hash of the pairs that are different; "" if there are none."""
    found = _different(storage)
    return fingerprint([found[name].to_pylist() for name in ("a", "b")]) if len(found) else ""


def apart(storage: Storage, keys: npt.NDArray[np.bytes_]) -> Apart:
    """Return the pairs of rows that are different; `keys` [n] are the rows' keys, 16 raw bytes each."""
    found = _different(storage)
    if not len(found) or not len(keys):
        return NOTHING
    a, b = ([bytes.fromhex(key) for key in found[name].to_pylist()] for name in ("a", "b"))
    wanted = np.unique(_first_halves(b"".join([*a, *b])))
    near = which(len(keys), lambda piece: np.isin(_first_halves(np.ascontiguousarray(keys[piece]).tobytes()), wanted))
    place = {keys[row].ljust(16, b"\0"): row for row in near.tolist()}  # numpy drops zeros at the end
    both = [(place[one], place[other]) for one, other in zip(a, b, strict=True) if one in place and other in place]
    return Apart.of(len(keys), np.array(both, np.int64).reshape(-1, 2))


def _first_halves(keys: bytes) -> npt.NDArray[np.uint64]:
    """Return the first halves of keys, which are fast to compare."""
    return np.frombuffer(keys, np.uint64)[::2]


# Damage ----------------------------------------------------------------------------------------------------------


def verify_pairs(storage: Storage) -> list[str]:
    """Return what is wrong with the verdicts on pairs, one line that names the file."""
    try:
        problem = _problem(storage.read_table(FILE))
    except FileNotFoundError:
        return []
    except DamagedFile as error:
        problem = error.problem
    return [f"{FILE}: damaged ({problem}): {_HINT}"] if problem else []


def _problem(table: pa.Table) -> str:
    """Return what keeps a table from holding verdicts on pairs, or ""."""
    if table.schema.names != SCHEMA.names or table.schema.types != SCHEMA.types:
        return f"its columns are not {', '.join(SCHEMA.names)}"
    if any(column.null_count for column in table.columns):
        return "a value is missing"
    for name in ("a", "b"):
        if not pc.all(pc.match_substring_regex(table[name], _KEY), min_count=0).as_py():
            return "a key is not 32 hexadecimal digits"
    if not pc.all(pc.less(table["a"], table["b"]), min_count=0).as_py():
        return "the keys of a pair are not in order"
    places = pc.binary_join_element_wise(table["a"], table["b"], " ")
    if len(table) > 1 and not pc.all(pc.less(places[:-1], places[1:])).as_py():
        return "its pairs are not sorted, or one is there twice"
    if not pc.all(pc.is_in(table["verdict"], pa.array(VERDICTS, pa.string())), min_count=0).as_py():
        return f"a verdict is neither {' nor '.join(VERDICTS)}"
    return ""
