"""Which keys a batch has: found in few reads, and never in keys that were changed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.source.planning import known_keys
from capstan.pipeline.source.planning.known_keys import KnownKeys, UnitKeys
from capstan.pipeline.storage import Storage

COUNTS = [40, 40, 40, 7]


@pytest.fixture
def keys() -> list[bytes]:
    source = random.Random(1)
    made = [source.randbytes(16) for _ in range(sum(COUNTS) - 2)]
    return sorted([*made, made[0][:15] + b"\0", bytes(16)])  # numpy ignores zeros at the end


@pytest.fixture
def storage(tmp_path: Path, keys: list[bytes]) -> Storage:
    storage = Storage(str(tmp_path))
    storage.write("keys.bin", b"".join(keys))
    return storage


def known(storage: Storage, keys: list[bytes]) -> KnownKeys:
    return KnownKeys(storage, "keys.bin", UnitKeys.of(b"".join(keys), COUNTS))


@pytest.mark.parametrize("read_bytes", [16, 16 * 90, 1 << 20])
def test_these_and_no_others(
    storage: Storage, keys: list[bytes], read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_keys, "_READ_BYTES", read_bytes)
    source = random.Random(2)
    asked = sorted([*source.sample(keys, 60), *(source.randbytes(16) for _ in range(60)), b"\0" * 15 + b"\1"])
    found = known(storage, keys).among(np.array(asked, "S16"))
    assert found.tolist() == [key in keys for key in asked]
    assert known(storage, keys).among(np.zeros(0, "S16")).tolist() == []


def test_one_key_is_looked_up_in_its_unit_alone(
    storage: Storage, keys: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[tuple[int, int]]()
    whole = Storage.read_range
    monkeypatch.setattr(
        Storage, "read_range", lambda self, name, a, b: (read.append((a // 16, b // 16)), whole(self, name, a, b))[1]
    )
    assert known(storage, keys).among(np.array([keys[90]], "S16")).tolist() == [True]
    assert read == [(80, 120)]


def test_changed_keys_are_refused(storage: Storage, keys: list[bytes]) -> None:
    wrong = [*keys[:90], bytes(16), *keys[91:]]
    storage.write("keys.bin", b"".join(wrong))
    asked = known(storage, keys)
    assert asked.among(np.array([keys[3]], "S16")).tolist() == [True]
    with pytest.raises(DamagedFile, match=r"keys\.bin"):
        asked.among(np.array([keys[100]], "S16"))
    storage.delete("keys.bin")
    with pytest.raises(DamagedFile, match="missing"):
        asked.among(np.array([keys[3]], "S16"))
