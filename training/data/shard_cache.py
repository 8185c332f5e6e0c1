"""Files of a bucket → copies in a local folder of bounded size

    FOLDER/<hash of url, name and content>     a finished copy: published by a rename, whole or not at all
    FOLDER/lock                                held briefly while space is freed

All processes of a machine share the folder. A reader holds a shared lock (flock) on the copy that it reads, and a
killed process loses its locks: so a copy in use is never removed, and the size limit holds on the disk itself. The
least recently used copies are removed first. A copy in progress has its full size from the start. If there is no space,
no copy is made, and the reader reads from the bucket.
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

_PIECE = 64 << 20  # bytes per request; the storage reads them in parallel ranges
_COPIES = 2  # concurrent copies per process
_NAME = 32  # hexadecimal digits of a copy's name


class Copy:
    """A finished copy being read: its bytes, mapped. It stays on disk while this object exists."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file  # holds the lock
        self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class ShardCache:
    """Copies of the files of `storage` in `folder`, at most `limit` bytes including copies of other processes."""

    def __init__(self, storage: Storage, folder: Path, limit: int) -> None:
        self.storage, self.folder, self.limit = storage, folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "lock").touch()
        except OSError as error:
            hint = "name a folder on a local disk"
            raise RecipeError("train.data.cache.folder", f"cannot write to {folder} ({error})", hint) from None
        Storage(str(folder)).sweep()  # unfinished files of killed processes
        self._requested: set[str] = set()
        self._lock, self._closed, self._warned = threading.Lock(), False, False
        self._queue: SimpleQueue[tuple[str, Path, str | None] | None] = SimpleQueue()
        # Daemons: an exiting process does not wait for copies that it no longer needs.
        self._threads = [threading.Thread(target=self._work, name="cache", daemon=True) for _ in range(_COPIES)]
        for thread in self._threads:
            thread.start()

    def open(self, name: str, tag: str) -> Copy | None:
        """Return the copy of the file `name` with content `tag`, or None if there is none (yet)."""
        file = self._open(name, tag)
        return None if file is None else Copy(file)

    def read_range(self, name: str, tag: str, start: int, stop: int) -> bytes | None:
        """Return bytes [start, stop) of that copy, or fewer if it is shorter; None if there is no copy."""
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
            if os.fstat(file.fileno()).st_nlink:  # otherwise it was removed between the two calls
                _touch(path)
                return file
            file.close()

    def prefetch(self, name: str, tag: str, sha256: str | None = None) -> None:
        """Copy the file in the background, unless it is copied or queued. If `sha256` is known, it is checked."""
        path = self._path(name, tag)
        with self._lock:
            if path.exists():
                _touch(path)  # needed soon: not the next to be removed
            elif not self._closed and path.name not in self._requested:
                self._requested.add(path.name)
                self._queue.put((name, path, sha256))

    def fetch(self, name: str, tag: str) -> Copy | None:
        """Return the copy of a file, made now if there is none; None if there is no space for it."""
        if (copy := self.open(name, tag)) is not None:
            return copy
        self._copy(name, self._path(name, tag), None)
        return self.open(name, tag)

    def fits(self, dataset: Dataset, shards: int) -> bool:
        """Return whether any `shards` tars of the dataset fit into the cache; warn if they do not."""
        needed = sum(sorted((entry.bytes for entry in dataset.manifest.shards), reverse=True)[:shards])
        if needed > self.limit:
            facts = (self.folder, self.limit / 2**30, needed / 2**30 + 0.01)
            logger.warning(
                "the cache %s (%.2f GiB) is too small to prefetch shards. Fix: set train.data.cache.gib: %.2f", *facts
            )
        return needed <= self.limit

    def close(self) -> None:
        """Drop queued copies, and wait for those in progress."""
        with self._lock:
            self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _path(self, name: str, tag: str) -> Path:
        known = hashlib.sha256("\0".join((self.storage.url, name, tag)).encode()).hexdigest()
        return self.folder / known[:_NAME]

    def _work(self) -> None:
        """Make the queued copies. If one fails, the reader reads from the bucket and gets the error there."""
        while (job := self._queue.get()) is not None:
            name, path, sha256 = job
            try:
                if not self._closed:
                    self._copy(name, path, sha256)
            except (CapstanError, OSError) as error:
                logger.warning("no copy of %s in the cache: %s", name, error)
            finally:
                with self._lock:
                    self._requested.discard(path.name)

    def _copy(self, name: str, path: Path, sha256: str | None) -> None:
        # One process of the machine copies a file; the others wait here until it is done.
        with self._locked(path.with_suffix(".lock"), remove=True):
            if path.exists():
                return
            size = self.storage.size(name)
            partial = self._reserve(path, size)
            if partial is None:
                self._warn_full(size)
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
        """Fill the file `partial`; return False if the cache was closed meanwhile."""
        digest = hashlib.sha256()
        with partial.open("r+b") as file:
            for start in range(0, size, _PIECE):
                if self._closed:
                    return False
                piece = self.storage.read_range(name, start, min(start + _PIECE, size))
                digest.update(piece)
                file.write(piece)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise CapstanError(
                f"{self.storage.url}/{name} does not match its checksum in dataset.json: run `capstan verify`"
            )
        return True

    def _reserve(self, path: Path, size: int) -> Path | None:
        """Free `size` bytes and reserve them as a file of that size; return None if too many copies are in use."""
        with self._locked(self.folder / "lock"):
            files = self._files()
            free = self.limit - sum(status.st_size for status in files.values())
            copies = sorted((status.st_mtime_ns, copy) for copy, status in files.items() if len(copy.name) == _NAME)
            for _, copy in copies if size <= self.limit else []:
                if free >= size:
                    break
                free += _remove(copy)
            if free < size:
                return None
            partial = partial_of(path)
            with partial.open("wb") as file:
                file.truncate(size)
            return partial

    def _files(self) -> dict[Path, os.stat_result]:
        """Return finished copies and copies in progress, with their status."""
        files = {}
        for path in self.folder.iterdir():
            if len(path.name) == _NAME or path.name.startswith(PARTIAL):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    files[path] = path.stat()
        return files

    def _warn_full(self, size: int) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "the cache %s (%.2f GiB) has no space for a file of %.2f GiB next to those in use; it is read from the "
                "bucket. Fix: raise train.data.cache.gib, or lower train.data.block",
                *(self.folder, self.limit / 2**30, size / 2**30),
            )

    @contextlib.contextmanager
    def _locked(self, path: Path, remove: bool = False) -> Iterator[None]:
        """Hold the lock file `path`; with `remove`, delete it afterwards."""
        while True:
            with path.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if remove and not os.fstat(file.fileno()).st_nlink:
                    continue  # its holder removed it, and others may hold a new one
                try:
                    yield
                finally:
                    if remove:
                        path.unlink(missing_ok=True)
                return


def _touch(path: Path) -> None:
    """Record that a copy is used, with the exact time: the file system's own clock may be 10 ms late."""
    now = time.time_ns()
    with contextlib.suppress(FileNotFoundError, PermissionError):  # removed meanwhile; another user's
        os.utime(path, ns=(now, now))


def _remove(path: Path) -> int:
    """Remove a copy unless it is in use; return the number of bytes freed."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(file.fileno()).st_size
            path.unlink(missing_ok=True)
            return size
    except (FileNotFoundError, BlockingIOError):
        return 0
