"""Files of a bucket → whole copies in a folder of this machine, bounded in bytes, shared by all its processes.

    FOLDER/<hash of url, name and content>     a finished copy: published by a rename, whole or not at all
    FOLDER/lock                                held while room is made, for an instant

A reader keeps a shared lock (flock) on the copy that it reads, and a process that is killed loses its locks: so what is
removed to make room, the least recently used first, is never in use, and the bound holds on the disk itself. A copy
under way has its full size from the start. Where there is no room there is no copy, and the reader goes to the bucket.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import PARTIAL, as_disk_full, partial_of

logger = logging.getLogger(__name__)

_PIECE = 64 << 20  # bytes asked for at once; the storage reads them in parallel ranges
_COPIES = 2  # under way at once in one process
_NAME = 32  # digits


class Copy:
    """A finished copy that is being read: its bytes, mapped. It stays on the disk until this is let go of."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file  # holds the lock
        self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class ShardCache:
    """Copies of the files of `storage` in `folder`, which may hold at most `limit` bytes, others' copies included."""

    def __init__(self, storage: Storage, folder: Path, limit: int) -> None:
        self.storage, self.folder, self.limit = storage, folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "lock").touch()
        except OSError as error:
            hint = "name a folder on a disk of this machine"
            raise RecipeError("train.data.cache.folder", f"cannot write to {folder} ({error})", hint) from None
        Storage(str(folder)).sweep()  # what killed processes left half-done
        self._asked: set[str] = set()
        self._lock, self._closed, self._said = threading.Lock(), False, False
        self._todo: SimpleQueue[tuple[str, Path, str | None] | None] = SimpleQueue()
        # Daemons: a process that ends does not wait for what it has no use for any more.
        self._threads = [threading.Thread(target=self._work, name="cache", daemon=True) for _ in range(_COPIES)]
        for thread in self._threads:
            thread.start()

    def open(self, name: str, tag: str) -> Copy | None:
        """The copy of the file `name` whose content is known as `tag`, or None where there is none (yet)."""
        file = self._open(name, tag)
        return None if file is None else Copy(file)

    def read_range(self, name: str, tag: str, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of that copy; fewer where it is shorter."""
        file = self._open(name, tag)
        if file is None:
            return None
        with file:
            return os.pread(file.fileno(), stop - start, start)

    def _open(self, name: str, tag: str) -> BinaryIO | None:
        path = self._path(name, tag)
        while True:
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError:
                return None
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_nlink:  # else it was removed between the two calls
                _touch(path)
                return file
            file.close()

    def ahead(self, name: str, tag: str, sha256: str | None = None) -> None:
        """Copy the file in the background, unless that is done or under way. `sha256` is checked where it is known."""
        path = self._path(name, tag)
        with self._lock:
            if path.exists():
                _touch(path)  # it will be used: not now the next to go
            elif not self._closed and path.name not in self._asked:
                self._asked.add(path.name)
                self._todo.put((name, path, sha256))

    def fetch(self, name: str, tag: str) -> Copy | None:
        """The copy of a file that is needed whole, made now if there is none; None where there is no room for it."""
        if (found := self.open(name, tag)) is not None:
            return found
        self._copy(name, self._path(name, tag), None)
        return self.open(name, tag)

    def holds(self, dataset: Dataset, shards: int) -> bool:
        """Whether any so many of the dataset's tars fit in; warns where they do not."""
        needed = sum(sorted((entry.bytes for entry in dataset.manifest.shards), reverse=True)[:shards])
        if needed > self.limit:
            facts = (self.folder, self.limit / 2**30, needed / 2**30 + 0.01)
            logger.warning(
                "the cache %s (%.2f GiB) is too small to copy shards ahead. Fix: train.data.cache.gib: %.2f", *facts
            )
        return needed <= self.limit

    def close(self) -> None:
        """Give up what has not begun, and wait for what has."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()

    def _path(self, name: str, tag: str) -> Path:
        known = hashlib.sha256("\0".join((self.storage.url, name, tag)).encode()).hexdigest()
        return self.folder / known[:_NAME]

    def _work(self) -> None:
        """Copy what is asked for. Where that fails the reader asks the bucket, which says what is wrong."""
        while (job := self._todo.get()) is not None:
            name, path, sha256 = job
            try:
                if not self._closed:
                    self._copy(name, path, sha256)
            except (CapstanError, OSError) as error:
                logger.warning("no copy of %s in the cache: %s", name, error)
            finally:
                with self._lock:
                    self._asked.discard(path.name)

    def _copy(self, name: str, path: Path, sha256: str | None) -> None:
        # One process of the machine copies a file; the others wait for it here, and find it done.
        with self._locked(path.with_suffix(".lock"), remove=True):
            if path.exists():
                return
            size = self.storage.size(name)
            partial = self._reserve(path, size)
            if partial is None:
                self._say_full(size)
                return
            try:
                if self._download(name, size, partial, sha256):
                    with self._locked(self.folder / "lock"):
                        _touch(partial)
                        partial.replace(path)
            except OSError as error:
                raise as_disk_full(error, self.folder, size) or error from None
            finally:
                partial.unlink(missing_ok=True)

    def _download(self, name: str, size: int, partial: Path, sha256: str | None) -> bool:
        """Fill the file `partial`; False where the cache was closed before the end."""
        digest = hashlib.sha256()
        with partial.open("r+b") as file:
            for start in range(0, size, _PIECE):
                if self._closed:
                    return False
                piece = self.storage.read_range(name, start, min(start + _PIECE, size))
                digest.update(piece)
                file.write(piece)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise CapstanError(f"{self.storage.url}/{name} is not what dataset.json says: run `capstan verify`")
        return True

    def _reserve(self, path: Path, size: int) -> Path | None:
        """Make room for `size` bytes and take it, as a file of that size; None where what is there is in use."""
        with self._locked(self.folder / "lock"):
            there = self._files()
            free = self.limit - sum(status.st_size for status in there.values())
            copies = sorted((status.st_mtime_ns, at) for at, status in there.items() if len(at.name) == _NAME)
            for _, at in copies if size <= self.limit else []:
                if free >= size:
                    break
                free += _removed(at)
            if free < size:
                return None
            partial = partial_of(path)
            with partial.open("wb") as file:
                file.truncate(size)
            return partial

    def _files(self) -> dict[Path, os.stat_result]:
        """Copies, and what is under way."""
        found = {}
        for path in self.folder.iterdir():
            if len(path.name) == _NAME or path.name.startswith(PARTIAL):
                with contextlib.suppress(FileNotFoundError):  # given up just now
                    found[path] = path.stat()
        return found

    def _say_full(self, size: int) -> None:
        if not self._said:
            self._said = True
            logger.warning(
                "the cache %s (%.2f GiB) has no room for a file of %.2f GiB beside those in use: it is read from the "
                "bucket itself. Fix: raise train.data.cache.gib, or lower train.data.block",
                *(self.folder, self.limit / 2**30, size / 2**30),
            )

    @contextlib.contextmanager
    def _locked(self, path: Path, remove: bool = False) -> Iterator[None]:
        """Hold the lock file `path`, which may vanish with its last holder."""
        while True:
            with path.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if remove and not os.fstat(file.fileno()).st_nlink:
                    continue  # its holder has removed it: others may hold a new one
                try:
                    yield
                finally:
                    if remove:
                        path.unlink(missing_ok=True)
                return


def _touch(path: Path) -> None:
    """Note that a copy is used. By the exact time: the one that a file system would set may be 10 ms old."""
    now = time.time_ns()
    with contextlib.suppress(FileNotFoundError, PermissionError):  # gone just now; another user's
        os.utime(path, ns=(now, now))


def _removed(path: Path) -> int:
    """Remove a copy unless it is in use; gives how many bytes that frees."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(file.fileno()).st_size
            path.unlink(missing_ok=True)
            return size
    except (FileNotFoundError, BlockingIOError):
        return 0
