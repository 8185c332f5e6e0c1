"""Every command that writes, under every fault: it leaves the same bytes, or ends with one line and loses nothing.

A cell is one test, e.g. `pytest -m slow tests/integration/test_fault_matrix.py -k 'remove and inodes'`. Commands are
processes, disks are tmpfs mounts (which takes root), the bucket is `rclone serve s3` behind
tests/helpers/fault_proxy.py. Each cell prints what happened; docs/recovery.md holds the table.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_life import Ended, Life, warm
from fault_matrix import COMMANDS, Command, Place, Workshop, listing, wait_for_change
from s3 import S3, Faulty
from small_disk import Disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = 10
STRUCK = 3  # requests, at least
DAY_S = 24 * 3600.0


@pytest.fixture(scope="session")
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    chosen = [item.callspec.params.get("command") for item in request.session.items if hasattr(item, "callspec")]
    warm(models=any(command.models for command in chosen if isinstance(command, Command)))
    return Workshop(tmp_path_factory.mktemp("matrix"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    made.close()


class Cell:
    """A command under a fault: runs it, and compares what it leaves with what it leaves undisturbed."""

    def __init__(self, shop: Workshop, command: Command) -> None:
        self.shop, self.command, self.seen = shop, command, list[str]()
        self.normal = shop.undisturbed(command)
        self.chance = random.Random(command.name)

    def begin(self, place: Place) -> Life:
        return self.shop.launch(self.command, place)

    def note(self, ended: Ended, place: Place) -> None:
        """Check that a disturbed command succeeded with the same bytes, or failed clearly."""
        assert ended.is_clear(), f"exit {ended.code}\n" + "\n".join(ended.lines)
        if ended.code == 0:
            self.same(place)
        self.seen.append("same bytes" if ended.code == 0 else str(ended).replace(str(place.folder), "…"))

    def complete(self, place: Place) -> None:
        """Run the same command once more, undisturbed."""
        ended = self.shop.run(self.command, place)
        assert ended.code == 0, "\n".join(ended.lines)
        self.same(place)
        assert not [name for name, _ in listing(place.folder) if ".partial-" in name], "temporary files are left"

    def same(self, place: Place) -> None:
        found, wanted = self.command.products(place.folder), self.normal.products
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if found[name] != wanted[name]] == []

    def stopped_within(self, life: Life, place: Place) -> bool:
        """Wait for a random moment of its work; return whether it is still at work then."""
        return wait_for_change(life, place.folder) and not life.wait(self.chance.uniform(0, self.normal.seconds))


def killed(cell: Cell, tmp_path: Path) -> None:
    place, kills, lives = cell.shop.place(cell.command, tmp_path / "place-0"), 0, 0
    while kills < KILLS:
        life, lives = cell.begin(place), lives + 1
        if cell.stopped_within(life, place):
            life.kill()
            kills += 1
        else:
            ended = life.end()
            assert ended.code == 0, "\n".join(ended.lines)
            cell.same(place)
            place = cell.shop.place(cell.command, tmp_path / f"place-{lives}")
    cell.complete(place)
    cell.seen.append(f"same bytes after {kills} kills")


def full(cell: Cell, disk: Disk, fill: Callable[[int], None], need: int) -> None:
    """Fill the disk so that the command has no room at all, and half of what it needs; the next run has room."""
    for half in (0, 1):
        place = cell.shop.place(cell.command, disk.folder / f"place-{half}")
        fill(need * half // 2)
        ended = cell.shop.run(cell.command, place)
        disk.empty()
        cell.note(ended, place)
        cell.complete(place)
        subprocess.run(["rm", "-rf", str(place.folder)], check=True)


def read_only(cell: Cell, disk: Disk) -> None:
    """From the start, and from a random moment on."""
    place = cell.shop.place(cell.command, disk.folder / "place-0")
    before = listing(place.folder)
    assert disk.read_only()
    ended = cell.shop.run(cell.command, place)
    assert ended.code != 0
    assert listing(place.folder) == before
    disk.read_only(False)
    cell.note(ended, place)
    cell.complete(place)

    place = cell.shop.place(cell.command, disk.folder / "place-1")
    life = cell.begin(place)
    cell.stopped_within(life, place)
    while life.code() is None and not disk.read_only():
        time.sleep(0.002)
    ended = life.end()
    disk.read_only(False)
    cell.note(ended, place)
    cell.complete(place)


def in_bucket(cell: Cell, folder: Path, *options: str, **config: int) -> None:
    """Run behind the proxy, again with other requests struck until `STRUCK` of them were: some commands send few."""
    struck, requests, ends = 0, 0, list[Ended]()
    while struck < STRUCK and len(ends) < 2 * STRUCK:
        server = S3(folder / str(len(ends)), "capstan-key", "capstan-secret")
        place = cell.shop.place(cell.command, server.folder / "bucket")  # before the server, which remembers listings
        with server, Faulty(server, *options, "--seed", str(len(ends))) as faulty:
            place = Place(place.folder, "s3://bucket", **server_options(server, faulty.port, config))
            ends.append(cell.shop.run(cell.command, place))
            cell.note(ends[-1], place)
            if ends[-1].code:
                cell.complete(place)
        struck += faulty.counts.get("late", 0) + faulty.injected
        requests += faulty.counts["requests"]
    assert struck, "no request was struck"
    cell.seen.append(f"{struck} of {requests} requests in {len(ends)} runs")


def server_options(server: S3, port: int, config: dict[str, int]) -> dict[str, dict[str, Any]]:
    endpoint = f"http://127.0.0.1:{port}"
    env = server.env | {"AWS_ENDPOINT_URL": endpoint}
    return {"storage": {"endpoint_url": endpoint, "config_kwargs": config}, "env": env}


def clock_set_back(cell: Cell, tmp_path: Path) -> None:
    """After a kill the clock is set back a day: the files and the lease that were left are of tomorrow."""
    place = cell.shop.place(cell.command, tmp_path / "place")
    life = cell.begin(place)
    if cell.stopped_within(life, place):
        life.kill()
    life.end()
    for path in (path for path in place.folder.rglob("*") if path.is_file()):
        if path.parent.name == "leases" or path.name == "lease.json":
            lease = json.loads(path.read_bytes())
            path.write_text(json.dumps(lease | {"seen": lease["seen"] + DAY_S}))
        os.utime(path, (path.stat().st_atime + DAY_S, path.stat().st_mtime + DAY_S))
    cell.complete(place)
    cell.seen.append("same bytes")


def second_writer(cell: Cell, tmp_path: Path) -> None:
    """The same command twice at once."""
    place = cell.shop.place(cell.command, tmp_path / "place")
    lives = [cell.begin(place), cell.begin(place)]
    ends = [life.end() for life in lives]
    assert all(ended.is_clear() for ended in ends), "\n".join(line for ended in ends for line in ended.lines)
    if any(ended.code == 0 for ended in ends):
        cell.same(place)
    cell.complete(place)
    cell.seen.append(" and ".join(str(ended).replace(str(place.folder), "…") for ended in ends))


FAULTS = (
    *("SIGKILL", "disk full", "inodes full", "read-only"),
    *("S3 with faults", "S3 late", "clock back", "second writer"),
)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_cell(
    command: Command,
    fault: str,
    shop: Workshop,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cell, started = Cell(shop, command), time.monotonic()
    if fault == "SIGKILL":
        killed(cell, tmp_path)
    elif fault == "disk full":
        disk = request.getfixturevalue("disk")
        full(cell, disk, disk.leave_bytes, cell.normal.bytes)
    elif fault == "inodes full":
        disk = request.getfixturevalue("disk")
        full(cell, disk, disk.leave_files, cell.normal.files)
    elif fault == "read-only":
        read_only(cell, request.getfixturevalue("disk"))
    elif fault == "S3 with faults":
        in_bucket(cell, tmp_path / "s3", "--rate", "0.05", read_timeout=2)
    elif fault == "S3 late":
        late = ["--rate", "0.2", "--kinds", "late", "--delay", "30", "--most", "3"]
        in_bucket(cell, tmp_path / "s3", *late)
    elif fault == "clock back":
        clock_set_back(cell, tmp_path)
    else:
        second_writer(cell, tmp_path)
    with capsys.disabled():
        print(f"\nCELL {command.name} | {fault} | {time.monotonic() - started:.0f} s | {' / '.join(cell.seen)}")
