"""Finished files: whole or not there, and what is left behind by writers that were killed."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from small_disk import Disk

from capstan.pipeline.errors import DiskFull, RecipeError, StorageError
from capstan.pipeline.storage import Storage, find_files, local, open_file, read_ranges
from capstan.pipeline.storage.retry import is_retryable


@pytest.mark.timeout(60)
def test_a_named_pipe_in_a_dataset_is_not_waited_for(storage: Storage, tmp_path: Path) -> None:
    storage.write("other", b"")
    os.mkfifo(storage.path("dataset.json"))
    for read in (storage.read, storage.open, lambda name: storage.read_range(name, 0, 5)):
        with pytest.raises(StorageError, match="named pipe"):
            read("dataset.json")
    with pytest.raises(StorageError, match="named pipe"):
        storage.dataset(["dataset.json"], pa.schema([("key", pa.string())]))


def test_what_is_written_is_read(storage: Storage, tmp_path: Path) -> None:
    storage.write("a/one", b"first")
    storage.write("a/one", b"1234567890")
    (tmp_path / "made").write_bytes(b"made elsewhere")
    storage.put(tmp_path / "made", "a/b/two")
    assert storage.names() == ["a/b/two", "a/one"]
    assert storage.read_many(["a/one", "a/b/two"]) == {"a/one": b"1234567890", "a/b/two": b"made elsewhere"}
    assert storage.read_range("a/one", 2, 5) == b"345"
    assert storage.size("a/one") == 10
    with storage.open("a/one") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"890"
    storage.delete("a/one", "never there")
    assert not storage.exists("a/one")
    with pytest.raises(FileNotFoundError):
        storage.read("a/one")


def test_a_write_that_fails_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    storage.write("name", b"old")
    (tmp_path / "gone").write_bytes(b"x")
    storage.write("file/inside", b"a folder where a file shall be")
    for name in ("file", "name/below"):
        with pytest.raises(OSError):  # noqa: PT011 - which one is the system's choice
            storage.write(name, b"new")
    assert storage.names() == ["file/inside", "name"]
    assert left_in(storage) == []


def left_in(storage: Storage) -> list[str]:
    root = storage.local_path()
    return sorted(path.name for path in root.rglob("*") if path.name.startswith(local.PARTIAL))


KILLED_WRITER = """
import os, sys
from pathlib import Path
from capstan.pipeline.storage.local import _publish
with _publish(Path(sys.argv[1]) / "file", 4) as partial:
    partial.write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_killed_writers_left_is_removed_but_not_from_under_living_ones(storage: Storage) -> None:
    storage.write("finished", b"whole")
    command = [sys.executable, "-c", KILLED_WRITER, str(storage.local_path())]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    assert storage.sweep() == 0
    assert len(left_in(storage)) == 1
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert storage.names() == ["finished"]
    assert storage.sweep() == 1
    assert left_in(storage) == []


KILLED_SCRATCH = """
import sys
from capstan.pipeline.storage.local import scratch
with scratch() as folder:
    (folder / "rows").write_bytes(b"many")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_scratch_of_a_killed_process_is_removed_by_the_next_one(tmp_path: Path) -> None:
    command, place = [sys.executable, "-c", KILLED_SCRATCH], {**os.environ, "TMPDIR": str(tmp_path)}
    processes = []
    for _ in range(2):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=place)
        assert process.stdout is not None
        processes.append((process, Path(process.stdout.readline().strip())))
    (killed, its), (living, others) = processes
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert {its, others} <= set(tmp_path.iterdir())
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=place, check=True)
    assert set(tmp_path.iterdir()) == {others}
    assert not Path(done.stdout.strip()).exists()
    living.communicate("")
    assert list(tmp_path.iterdir()) == []


def test_a_full_scratch_disk_is_said() -> None:
    with pytest.raises(DiskFull, match="No space left"), local.scratch():
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError), local.scratch():
        raise FileNotFoundError("another thing")


def test_another_machines_unfinished_files_are_left_for_a_day(storage: Storage) -> None:
    storage.write("finished", b"whole")
    other = storage.local_path(f"{local.PARTIAL}0badcafe-1-12345678-file")
    other.write_bytes(b"half")
    assert storage.sweep() == 0
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(other, (two_days_ago, two_days_ago))
    assert storage.sweep() == 1


def test_a_read_only_disk_and_one_without_inodes_are_named(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk")
    try:
        storage = Storage(str(disk.folder / "ds"))
        storage.write("file", b"old")
        assert disk.read_only()
        for change in (lambda: storage.write("file", b"new"), lambda: storage.delete("file")):
            with pytest.raises(
                StorageError, match=rf"cannot \w+ {storage.url}/file \(Read-only file system\). Fix: make"
            ):
                change()
        with pytest.raises(RecipeError, match=r"^dataset: cannot write to .* Fix: make the folder writable"):
            storage.check_writable()
        assert disk.read_only(False)
        disk.leave_files(0)
        with pytest.raises(DiskFull, match=r"as many files as it can \(inodes\)\)\. Fix: remove files on the disk"):
            storage.write("other", b"new")
        assert storage.read("file") == b"old"
    finally:
        disk.close()


def test_a_full_disk_is_named_with_what_is_needed(tmp_path: Path) -> None:
    error = local.as_disk_full(OSError(28, "No space left on device"), tmp_path / "not" / "yet", 10**15)
    assert isinstance(error, DiskFull)
    assert error.exit_code == 1
    for part in (str(tmp_path), "No space left", "1,000,000,000.0 MB", "more on the disk at /", "the same command"):
        assert part in str(error)
    assert local.as_disk_full(OSError(5, "Input/output error"), tmp_path) is None
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_the_users_to_mend(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RecipeError, match="no permission"):
        Storage(str(tmp_path / "dataset")).check_writable()


def test_a_place_that_is_no_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"dataset: cannot write to .*/file/dataset"):
        Storage(str(tmp_path / "file" / "dataset")).check_writable()


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError(), True),
        (PermissionError("403"), False),
        (FileNotFoundError("404"), False),
        (OSError(22, "EINVAL"), False),
        (ValueError("a mistake"), False),
    ],
)
def test_what_can_heal(error: Exception, answer: bool) -> None:
    assert is_retryable(error) is answer


@pytest.mark.parametrize(("status", "answer"), [(429, True), (500, True), (503, True), (400, False), (403, False)])
def test_which_answers_can_heal(status: int, answer: bool) -> None:
    botocore = pytest.importorskip("botocore.exceptions")
    said = {"Error": {"Code": str(status)}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = OSError(5, "as s3fs raises it")
    error.__cause__ = botocore.ClientError(said, "GetObject")
    assert is_retryable(error) is answer
    assert is_retryable(error.__cause__) is answer


def test_sources_of_any_fsspec_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capstan.pipeline.storage.retry.FIRST_WAIT_S", 0.01)
    shared = Storage("memory://sources")
    shared.write("a.txt", b"0123456789")
    shared.write("b.txt", b"b")
    found = find_files("memory://sources/*.txt", {})
    assert [(file.path, file.size) for file in found] == [
        ("memory:///sources/a.txt", 10),
        ("memory:///sources/b.txt", 1),
    ]
    assert read_ranges([(found[0].path, 3, 7), (found[0].path, 0, 1)], {}) == [b"3456", b"0"]
    with open_file(found[0].path, {}) as file:
        file.seek(8)
        assert file.read() == b"89"
    good, bad = read_ranges([(found[0].path, 0, 1), (found[0].path, 0, 20)], {})
    assert good == b"0"
    assert isinstance(bad, StorageError)
    assert re.match(r"cannot read memory:///sources/a.txt \(10 bytes received instead of 20", str(bad))


class Refused(Exception):
    """A client's own error, which is neither an OSError nor a ValueError."""


class Refusing(MemoryFileSystem):
    """One of those that connect as soon as they are made (SFTP, FTP)."""

    protocol = "refusing"

    def __init__(self, **options: object) -> None:
        raise Refused("no such user")


def test_a_file_system_that_cannot_be_opened_is_no_rows_fault() -> None:
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    with pytest.raises(RecipeError, match=r"source.path: cannot read refusing://a/\*.tar \(no such user\)"):
        find_files("refusing://a/*.tar", {})
    with pytest.raises(Refused, match="no such user"):
        read_ranges([("refusing://a/one.tar", 0, 1)], {})
