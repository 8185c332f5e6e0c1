"""Flipped bits in tables: each is either found or harmless."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pyarrow as pa
import pytest

from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.storage import Storage, parquet_bytes

TABLE = pa.table({"key": [f"{n:032x}" for n in range(3000)], "score": [n * 0.37 % 1 for n in range(3000)]})
FLIPS = 400


def flipped(data: bytes, rng: random.Random, until: int) -> bytes:
    damaged = bytearray(data)
    bit = rng.randrange(8 * until)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def outcome(storage: Storage, name: str, sha256: str = "") -> str:
    try:
        table = storage.read_table(name, sha256=sha256)
    except DamagedFile as error:
        return "found" if name in error.file else "found without its name"
    return "harmless" if table.equals(TABLE) else "other data"


def test_a_bit_flipped_in_a_page_is_found_or_harmless(tmp_path: Path) -> None:
    storage, data, rng = Storage(str(tmp_path)), parquet_bytes(TABLE), random.Random(0)
    pages = len(data) - 8 - int.from_bytes(data[-8:-4], "little")  # the rest is the footer
    found = []
    for _ in range(FLIPS):
        storage.write("t.parquet", flipped(data, rng, pages))
        found.append(outcome(storage, "t.parquet"))
    assert set(found) <= {"found", "harmless"}
    assert found.count("found") > 0.9 * FLIPS


@pytest.mark.parametrize("named", [True, False], ids=["by its name", "by the sum"])
def test_a_bit_flipped_anywhere_is_found_if_the_sum_is_known(tmp_path: Path, named: bool) -> None:
    storage, data, rng = Storage(str(tmp_path)), parquet_bytes(TABLE), random.Random(0)
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"staged/0000-000001-{sha256[:16]}.parquet" if named else "shards/shard-000000.parquet"
    storage.write(name, data)
    assert outcome(storage, name, "" if named else sha256) == "harmless"
    for _ in range(100):
        storage.write(name, flipped(data, rng, len(data)))
        assert outcome(storage, name, "" if named else sha256) == "found"


def test_a_flipped_bit_is_found_by_a_scan(tmp_path: Path) -> None:
    storage, data = Storage(str(tmp_path)), bytearray(parquet_bytes(TABLE))
    data[len(data) // 3] ^= 1
    storage.write("t.parquet", bytes(data))
    with pytest.raises(OSError, match=r"(?i)crc"):
        storage.dataset(["t.parquet"], TABLE.schema).to_table()


def test_the_same_table_has_the_same_bytes() -> None:
    assert parquet_bytes(TABLE) == parquet_bytes(TABLE)
