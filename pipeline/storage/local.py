"""Local files: published by temporary name, fsync and rename

A writer that is killed leaves its temporary file, `.partial-OWNER-PID-ID-NAME`; `sweep` removes those whose writer has
ended. OWNER identifies the machine or container, since several can share a disk. Scratch folders are named and removed
the same way.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import math
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from capstan.pipeline.errors import DiskFull, StorageError
from capstan.pipeline.text.regular_file import NotRegular, regular

PARTIAL = ".partial-"  # prefix of every temporary name; never listed
_SCRATCH = "capstan-scratch-"
_OLD_S = 24 * 3600.0  # a temporary file of another machine is abandoned after this time
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


class Local:
    """The operations of a `Storage` on full paths of a local disk."""

    def exists(self, path: str) -> bool:
        return Path(path).exists()

    def size(self, path: str) -> int:
        return Path(path).stat().st_size

    def read(self, path: str) -> bytes:
        return Path(_file(path)).read_bytes()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with Path(_file(path)).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def open(self, path: str, *, ahead: bool = True) -> BinaryIO:
        return Path(_file(path)).open("rb")

    def check_regular(self, paths: Iterable[str]) -> None:
        """Raise StorageError for a path on which a reader would wait: of a named pipe or a device."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _file(path)

    def links(self, folder: str) -> list[str]:
        """Return the links at any depth, which no other method follows."""
        return [f"{root}/{name}" for root, _, links in _walk(folder) for name in links]

    def find(self, folder: str) -> list[str]:
        """Return all finished files at any depth."""
        return [f"{root}/{name}" for root, names, _ in _walk(folder) for name in names if not name.startswith(PARTIAL)]

    def write(self, path: str, data: bytes) -> None:
        with _publish(Path(path), len(data)) as partial, partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def put(self, source: Path, path: str) -> None:
        with _publish(Path(path), source.stat().st_size) as partial:
            shutil.move(source, partial)  # a rename if both are on one disk
            with partial.open("rb") as file:
                os.fsync(file.fileno())

    def delete(self, path: str) -> None:
        try:
            Path(path).unlink(missing_ok=True)
        except OSError as error:
            if shown := as_unwritable("remove", Path(path), error):
                raise shown from error
            raise

    def sweep(self, folder: str) -> int:
        """Remove the temporary files of writers that have ended; return how many."""
        left = [Path(root, name) for root, names, _ in _walk(folder) for name in names if name.startswith(PARTIAL)]
        abandoned = [path for path in left if _is_abandoned(path)]
        for path in abandoned:
            path.unlink(missing_ok=True)
        return len(abandoned)


def _file(path: str) -> str:
    """Return a path to read. Raises StorageError for a named pipe or a device, on which a reader could wait."""
    try:
        return regular(path)
    except NotRegular as error:
        raise StorageError(f"read {path}", str(error.strerror), "replace it by a file, or remove it") from None


def as_disk_full(error: OSError, folder: Path, needed: int | None = None) -> DiskFull | None:
    """Return the error to show if `error` means that the disk of `folder` is full, else None.

    `needed` is the size of the next file in bytes, if known.
    """
    if error.errno not in _FULL:
        return None
    while not folder.exists():
        folder = folder.parent
    if (files := os.statvfs(folder)).f_files and not files.f_favail:
        problem = f"{os.strerror(errno.ENOSPC)}: the file system holds as many files as it can (inodes)"
        hint = f"remove files on the disk at {_mount(folder)} and run the same command again: it resumes"
        return DiskFull(f"write to {folder}", problem, hint)
    free = shutil.disk_usage(folder).free
    at_least = f"at least {_megabytes(max(needed - free, 1))} more" if needed else "space"
    return DiskFull(
        f"write to {folder}",
        f"{os.strerror(error.errno or errno.ENOSPC)}: {_megabytes(free)} free"
        + (f", the next file has {_megabytes(needed)}" if needed else ""),
        f"free {at_least} on the disk at {_mount(folder)} and run the same command again: it resumes",
    )


@contextlib.contextmanager
def disk_errors(folder: Path | None = None) -> Iterator[None]:
    """Raise a CapstanError in place of any error which means that a disk is full, read-only or failing.

    `folder` is where the block writes, for errors that name no file.
    """
    try:
        yield
    except Exception as error:
        if shown := disk_error(error, folder):
            raise shown from error
        raise


def disk_error(error: Exception, folder: Path | None = None) -> StorageError | None:
    """Return the error that `disk_errors` raises in its place, if any."""
    if not isinstance(error, OSError):
        code = re.search(r"\(os error (\d+)\)", str(error))  # libraries written in Rust: safetensors, tokenizers
        return disk_error(OSError(int(code[1]), os.strerror(int(code[1]))), folder) if code else None
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    if (place := named.parent if named else folder) and (full := as_disk_full(error, place)):
        return full
    if error.errno in _FULL:
        hint = "free space and run the same command again: it resumes"
        return DiskFull("write a file", os.strerror(error.errno or 0), hint)
    return as_unwritable("use", named or folder or Path(), error)


def sweep_folders(parent: Path, name: str) -> None:
    """Remove the temporary folders of killed processes that were to become `name` in `parent` (`partial_of`)."""
    for path in parent.glob(f"{PARTIAL}*-{name}"):
        if path.is_dir() and not path.is_symlink() and _has_ended(path.name.removeprefix(PARTIAL)):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Return a folder for temporary files. It is removed at the end; after a kill, by the next process that needs one.

    Raises DiskFull if its disk is full.
    """
    _sweep_scratch()
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{owner()}-{os.getpid()}-") as name:
        try:
            yield Path(name)
        except OSError as error:
            if full := as_disk_full(error, Path(name)):
                raise full from error
            raise


@functools.cache
def _sweep_scratch() -> None:
    """Remove the folders of killed processes, once per process."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        if _has_ended(path.name.removeprefix(_SCRATCH)):
            shutil.rmtree(path, ignore_errors=True)


def partial_of(target: Path) -> Path:
    """Return a temporary name next to `target`, by which `sweep` knows whether its writer, this process, still runs."""
    return target.with_name(f"{PARTIAL}{owner()}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{target.name}")


@contextlib.contextmanager
def _publish(target: Path, size: int) -> Iterator[Path]:
    """Return a temporary name next to `target` that becomes `target` on success and is removed on failure."""
    partial = partial_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            shown = as_disk_full(error, target.parent, size) or as_unwritable("write", target, error)
            if shown:
                raise shown from error
        raise


def as_unwritable(verb: str, path: Path, error: OSError) -> StorageError | None:
    """Return the error to show if `error` means that the disk takes no changes: read-only, not permitted, failing."""
    if error.errno not in _UNWRITABLE:
        return None
    hint = "make the folder writable, then run the same command again: it resumes"
    return StorageError(f"{verb} {path}", os.strerror(error.errno or 0), hint)


def _is_abandoned(path: Path) -> bool:
    """Return whether its process on this machine has ended, or it is too old to be in use."""
    if _has_ended(path.name.removeprefix(PARTIAL)):
        return True
    try:
        return time.time() - path.stat().st_mtime > _OLD_S
    except FileNotFoundError:
        return False


def _has_ended(name: str) -> bool:
    """Return whether OWNER-PID-… names a process of this machine that has ended."""
    where, pid, *_ = [*name.split("-"), ""]
    return where == owner() and pid.isdigit() and not is_alive(int(pid))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


@functools.cache
def owner() -> str:
    """Return eight digits that identify where process ids are valid: this machine since its boot, or this container."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux only
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.blake2b("\0".join(facts).encode(), digest_size=4).hexdigest()


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (folder, names of its files, names of its links) for `folder` and all below. Links are not followed: what
    is listed may be deleted or published.
    """
    folders, names, links = list[str](), list[str](), list[str]()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                kind = links if entry.is_symlink() else folders if entry.is_dir() else names
                kind.append(entry.name)
    except (FileNotFoundError, NotADirectoryError):  # another process may have removed it
        return
    yield folder, names, links
    for name in folders:
        yield from _walk(f"{folder}/{name}")


def _mount(folder: Path) -> Path:
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.is_mount())


def _megabytes(size: int) -> str:
    return f"{math.ceil(size / 1e5) / 10:,.1f} MB"  # rounded up: nobody can free 0.0 MB
