"""Builds into a bucket that answers 500 and 503, resets, stalls and cuts bodies short; and into one that has gone."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from repo import HELPERS

from capstan.pipeline import build
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.errors import StorageError
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration

PROXY = HELPERS / "fault_proxy.py"
KEYS = {"key": "capstan-key", "secret": "capstan-secret"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a real S3 server on loopback, with a bucket named `bucket`."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rclone = str(Path(sys.executable).with_name("rclone"))
    keys = f"{KEYS['key']},{KEYS['secret']}"
    command = [rclone, "serve", "s3", "--auth-key", keys, "--addr", f"127.0.0.1:{port}", "."]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.1)
    yield port
    process.terminate()
    process.wait()


class Faulty:
    """The proxy in front of the server, as a context; afterwards `counts` says what it did."""

    def __init__(self, server: int, *options: str) -> None:
        command = [sys.executable, str(PROXY), str(server), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.counts: dict[str, int] = {}

    def __enter__(self) -> "Faulty":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.counts = json.loads(self.process.communicate(timeout=240)[0])

    def storage(self, name: str) -> Storage:
        return Storage(f"s3://bucket/{name}", options(self.port))


def options(port: int) -> dict[str, Any]:
    """A recipe's `storage`."""
    return {**KEYS, "endpoint_url": f"http://127.0.0.1:{port}", "config_kwargs": {"read_timeout": 1}}


def recipe(port: int, name: str, **sections: Any) -> Recipe:
    """A small captioned world, fetched over HTTP, with the web's defects; many small units, so many requests."""
    settings = {
        "dataset": f"s3://bucket/{name}",
        "storage": options(port),
        "source": {"format": "world", "world": {"scenes": 60, "size": 64}},
        "image": {"size": 32, "min_size": 24},
        "unit": {"rows": 2},
        "shards": {"samples": 8},
    }
    return Recipe.model_validate(settings | sections)


def published(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in storage.names() if name.startswith(("shards/", "ledger/"))}


def test_a_faulty_bucket_ends_with_the_bytes_of_a_sound_one(
    server: int, two_cpus: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capstan.pipeline.units.markers._GATHER_FROM", 5)
    sound = build.build(recipe(server, "sound"), progress=False)
    with Faulty(server, "--rate", "0.05") as bucket:
        faulty = build.build(recipe(bucket.port, "faulty"), progress=False)
    assert faulty["quarantined"] == {}
    assert faulty["counts"] == sound["counts"]
    assert sum(bucket.counts.values()) - bucket.counts["requests"] >= 8, "no kind of fault was left out"
    there, here = (Storage(f"s3://bucket/{name}", options(server)) for name in ("faulty", "sound"))
    assert published(there) == published(here)
    assert len(published(there)) > 20
    assert verify(there) == []

    with Faulty(server, "--rate", "0") as bucket:
        build.build(recipe(bucket.port, "sound"), progress=False)
    # About 75 for the dataset as a whole; one more for each of its 30 units would make 105.
    assert bucket.counts["requests"] < 95, "a finished dataset is not looked at unit by unit"


@pytest.mark.parametrize("kind", ["503", "refused", "reset", "stall", "stalled_body", "truncated", "short"])
def test_each_fault_heals(server: int, kind: str) -> None:
    data = os.urandom(300_000)
    with Faulty(server, "--rate", "0.5", "--kinds", kind) as bucket:
        storage = bucket.storage(f"one/{kind}")
        storage.write("data", data)
        assert storage.read("data") == data
        assert storage.read_range("data", 1000, 2000) == data[1000:2000]
        with storage.open("data") as file:
            file.seek(-10, 2)
            assert file.read() == data[-10:]
            file.seek(0)
            assert file.read(100_000) == data[:100_000]
        assert storage.names() == ["data"]
        storage.delete("data")
        assert not storage.exists("data")
    assert bucket.counts[kind] >= 1


def test_a_large_file_goes_in_parts_of_which_some_fail(server: int, tmp_path: Path) -> None:
    data = os.urandom(40 << 20) * 3
    (tmp_path / "large").write_bytes(data)
    with Faulty(server, "--rate", "0.3", "--kinds", "503,reset") as bucket:
        storage = bucket.storage("parts")
        storage.put(tmp_path / "large", "large")
        assert storage.read("large") == data
    assert bucket.counts["requests"] > 6


@pytest.mark.cluster
def test_a_bucket_that_has_gone_ends_the_build(server: int, two_cpus: Resources) -> None:
    with Faulty(server, "--rate", "1", "--kinds", "503", "--from-request", "60") as bucket:
        start = time.monotonic()
        with pytest.raises(
            StorageError, match=r"s3://bucket/gone/\S+ \(.*503.*\)\. Fix: .* run the same command again"
        ):
            build.build(recipe(bucket.port, "gone"), progress=False)
        assert time.monotonic() - start < 120
    assert bucket.counts["requests"] > 60
    build.build(recipe(server, "gone"), progress=False)  # the same command, once it is back
    assert verify(Storage("s3://bucket/gone", options(server))) == []


def test_a_bucket_that_never_answers_is_a_mistake_in_the_recipe(server: int, tmp_path: Path) -> None:
    with Faulty(server, "--rate", "1", "--kinds", "503") as bucket:
        file = tmp_path / "recipe.yaml"
        storage = {name: value for name, value in options(bucket.port).items() if name not in KEYS}
        file.write_text(recipe(bucket.port, "never", storage=storage).model_dump_json(exclude_none=True))
        keys = {"AWS_ACCESS_KEY_ID": KEYS["key"], "AWS_SECRET_ACCESS_KEY": KEYS["secret"]}
        command = [sys.executable, "-m", "capstan", "build", str(file)]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | keys)
        assert time.monotonic() - start < 120
    assert done.returncode == 2
    *tries, line = done.stderr.splitlines()
    assert all("; trying again in " in attempt for attempt in tries)
    assert line.startswith("error: dataset: cannot write to s3://bucket/never (")
    assert "503" in line
    assert "Fix: " in line


@pytest.mark.parametrize("missing", [{"dataset": "s3://no-such-bucket/x"}, {"key": "wrong-key"}])
def test_what_cannot_heal_is_not_tried_again(server: int, missing: dict[str, str]) -> None:
    with Faulty(server, "--rate", "0") as bucket:
        where = missing.pop("dataset", "s3://bucket/x")
        storage = Storage(where, options(bucket.port) | missing)
        with pytest.raises((StorageError, FileNotFoundError)):
            storage.write("file", b"data")
    assert bucket.counts["requests"] == 1
