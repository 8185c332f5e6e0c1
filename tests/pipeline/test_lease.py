from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capstan.pipeline import build, lease
from capstan.pipeline.config import Blocklist, Recipe, validate
from capstan.pipeline.errors import CapstanError
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import owner


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    return Storage(str(tmp_path / "dataset"))


def write(storage: Storage, **facts: Any) -> None:
    """A lease as another process leaves it."""
    other = {"id": "0", "command": "build", "host": "elsewhere", "pid": 7, "owner": "?", "seen": time.time()}
    storage.write(lease.NAME, json.dumps(other | facts).encode())


def read(storage: Storage) -> dict[str, Any]:
    return dict(json.loads(storage.read(lease.NAME)))


def test_a_second_writer_is_refused_and_told_who_is_at_it(storage: Storage) -> None:
    with (
        lease.lease(storage, "build"),
        pytest.raises(CapstanError, match=rf"capstan build, process {os.getpid()} on \S+, last seen \d s ago"),
        lease.lease(storage, "remove"),
    ):
        raise AssertionError("two at once")
    with lease.lease(storage, "remove"):
        assert read(storage)["command"] == "remove"
    assert storage.names() == []


def test_a_lease_is_kept_fresh(storage: Storage) -> None:
    with lease.lease(storage, "build"):
        first = read(storage)
        while (now := read(storage)) == first:
            time.sleep(0.01)
    assert now["id"] == first["id"]
    assert now["seen"] > first["seen"]


def test_one_whose_process_was_killed_is_taken_over_at_once(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 3600.0)  # whoever waited for a beat would not be back
    killed = subprocess.Popen([sys.executable, "-S", "-c", ""])
    killed.wait()
    write(storage, pid=killed.pid, owner=owner())
    unfinished = Path(storage.url) / f".partial-{owner()}-{killed.pid}-0-shard.tar"
    unfinished.touch()
    with lease.lease(storage, "build"):
        assert read(storage)["pid"] == os.getpid()
        assert not unfinished.exists()


def test_one_that_this_process_could_not_remove_is_no_hindrance(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as out:
        out.setattr(lease, "_PATIENCE_S", 0.1)
        with lease.lease(storage, "build"):
            left = read(storage)
            out.setattr(storage, "delete", lambda *_: time.sleep(0.2))  # the bucket is out
    assert read(storage)["id"] == left["id"]
    with lease.lease(storage, "build"):
        assert read(storage)["id"] != left["id"]


@pytest.mark.parametrize("off", [-3600, 3600], ids=["not seen for an hour", "its clock is ahead"])
def test_another_machines_is_taken_over_once_it_is_stale(storage: Storage, off: int) -> None:
    write(storage, seen=time.time() + off)
    with lease.lease(storage, "build"):
        assert read(storage)["pid"] == os.getpid()


def test_a_clock_that_goes_wrong_makes_no_lease_stale(storage: Storage) -> None:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.01):
            write(storage, seen=time.time() - 3600)

    write(storage, seen=time.time() - 3600)
    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(CapstanError, match="process 7 on elsewhere"), lease.lease(storage, "build"):
            pass
    finally:
        ended.set()
        other.join()


def test_who_lost_the_lease_ends_and_leaves_the_others_alone(storage: Storage) -> None:
    with lease.lease(storage, "build") as held:
        write(storage)
        time.sleep(0.2)  # some beats
        with pytest.raises(CapstanError, match="process 7 on elsewhere"):
            held.check()
    assert read(storage)["host"] == "elsewhere"


@pytest.mark.parametrize("command", ["build", "select", "remove"])
def test_commands_that_write_are_refused_while_another_does(storage: Storage, command: str) -> None:
    recipe = validate(Recipe, {"dataset": storage.url})
    commands: dict[str, Callable[[], object]] = {
        "build": lambda: build.build(recipe),
        "select": lambda: build.select(recipe),
        "remove": lambda: build.remove(storage.url, Blocklist()),
    }
    write(storage)
    before = storage.names()
    with pytest.raises(CapstanError, match="another process"):
        commands[command]()
    assert storage.names() == before


@pytest.mark.parametrize(
    ("held", "asked", "refused"),
    [
        ("", "captions/mine", True),
        ("captions/mine", "", True),
        ("captions/mine", "captions/mine", True),
        ("captions/mine", "captions/other", False),
        ("captions/mine", "latents/x", False),
    ],
)
def test_a_part_excludes_itself_and_the_whole(storage: Storage, held: str, asked: str, refused: bool) -> None:
    with lease.lease(storage, "one", held) as first:
        if refused:
            with pytest.raises(CapstanError, match="capstan one"), lease.lease(storage, "two", asked):
                pass
        else:
            with lease.lease(storage, "two", asked):
                first.check()
        first.check()
    with lease.lease(storage, "three", asked):
        pass
    assert storage.names() == []


def test_a_stale_lease_of_a_part_does_not_stop_the_whole(storage: Storage) -> None:
    other = {"id": "0", "command": "recaption", "host": "elsewhere", "pid": 7, "owner": "?", "seen": 0.0}
    storage.write("state/leases/captions%2Fmine.json", json.dumps(other).encode())
    with lease.lease(storage, "remove"):
        assert storage.names("state") == [lease.NAME]


def test_who_waits_gets_it_when_the_other_ends(storage: Storage) -> None:
    first = lease.HeldLease(storage, "encode", "latents/x")
    first.take()
    threading.Timer(0.3, first.release).start()
    start = time.monotonic()
    with lease.lease(storage, "encode", "latents/x", wait=True):
        assert time.monotonic() - start >= 0.3


def test_a_lease_that_was_removed_ends_its_holder(storage: Storage) -> None:
    with lease.lease(storage, "build") as held:
        storage.delete(lease.NAME)
        with pytest.raises(CapstanError, match="is gone"):
            held.check()
