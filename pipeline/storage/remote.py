"""Objects in a bucket: operations retried, lengths checked

Works on any file system that fsspec supports. A body may end early without any error (a proxy in between, a server that
crashed), so every read has a known length, and a shorter result is a failure like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from pyarrow.fs import FSSpecHandler, PyFileSystem

from capstan.pipeline.storage.retry import TruncatedRead, retry_call

PART_BYTES = 16 << 20  # larger objects are read in parallel ranges of this size
_READ_AHEAD_BYTES = 4 << 20
_READ_BYTES = 64 << 10
_STREAMS = 4  # ranges of one object in flight
_SLOWEST_BYTES_S = 100_000  # a transfer slower than this on the whole counts as stalled
_PATIENCE_S = 60.0

T = TypeVar("T")


class Remote:
    """The operations of a `Storage` on full paths of `fs`, an fsspec file system. `hint` is the advice in errors."""

    def __init__(self, fs: Any, hint: str) -> None:
        self.fs, self._hint = fs, hint

    def _try(self, verb: str, path: str, action: Callable[[], T]) -> T:
        return retry_call(action, f"{verb} {self.fs.unstrip_protocol(path)}", self._hint)

    def info(self, path: str) -> Mapping[str, Any]:
        """Return the file system's facts on a file or a folder: at least `type`; `size` may be None (a web server)."""
        return dict(self._try("look up", path, lambda: self.fs.info(path)))

    def exists(self, path: str) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        return int(self.info(path)["size"])

    def read(self, path: str) -> bytes:
        return self.read_range(path, 0, self.size(path))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        if stop - start <= PART_BYTES:
            return self._range(path, start, stop)
        parts = [(at, min(at + PART_BYTES, stop)) for at in range(start, stop, PART_BYTES)]
        with ThreadPoolExecutor(_STREAMS) as pool:
            return b"".join(pool.map(lambda part: self._range(path, *part), parts))

    def _range(self, path: str, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""

        def read() -> bytes:
            data = bytes(self._bounded("cat_file", stop - start, path, start=start, end=stop))
            if len(data) != stop - start:
                raise TruncatedRead(f"{len(data)} bytes received instead of {stop - start}")
            return data

        return self._try("read", path, read)

    def open(self, path: str, *, ahead: bool = True) -> BinaryIO:
        """Return a seekable reader that reads far `ahead` or little.

        If a web server does not support ranges, it reads a copy on disk.
        """
        info = self.info(path)
        if info.get("size") is None or ("http" in self.fs.protocol and not info.get("partial")):
            return self._try("read", path, lambda: self._copied(path))
        return io.BufferedReader(_Ranges(self, path, int(info["size"])), _READ_AHEAD_BYTES if ahead else _READ_BYTES)  # type: ignore[return-value]

    def _copied(self, path: str) -> BinaryIO:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - returned to the caller; closing removes it
        with self.fs.open(path, "rb") as body:
            shutil.copyfileobj(body, copy, _READ_AHEAD_BYTES)
        copy.seek(0)
        return copy  # type: ignore[return-value]

    def find(self, folder: str) -> list[str]:
        return list(self.details(folder))

    def details(self, folder: str) -> dict[str, Mapping[str, Any]]:
        """Return the file system's facts on all files at any depth."""

        def find() -> dict[str, Mapping[str, Any]]:
            self.fs.invalidate_cache()
            return dict(self.fs.find(folder, detail=True))

        return self._try("list", folder, find)

    def glob(self, pattern: str) -> dict[str, Mapping[str, Any]]:
        return dict(self._try("list", pattern, lambda: self.fs.glob(pattern, detail=True)))

    def write(self, path: str, data: bytes) -> None:
        self._try("write", path, lambda: self._bounded("pipe_file", len(data), path, data))

    def put(self, source: Path, path: str) -> None:
        """Upload a local file. Large ones are sent as parallel parts, each retried on its own."""
        size = source.stat().st_size
        self._try("write", path, lambda: self._bounded("put_file", size, str(source), path))

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._try("remove", path, lambda: self.fs.rm_file(path))

    def sweep(self, folder: str) -> int:
        """Do nothing: an interrupted upload leaves no object, only parts for the bucket's lifecycle rules to remove."""
        return 0

    def _bounded(self, method: str, size: int, *arguments: Any, **options: Any) -> Any:
        """Transfer `size` bytes; give up if it takes too long. An upload that stalls has no other limit."""
        if not self.fs.async_impl:
            return getattr(self.fs, method)(*arguments, **options)

        async def transfer() -> Any:
            limit = _PATIENCE_S + size / _SLOWEST_BYTES_S
            return await asyncio.wait_for(getattr(self.fs, f"_{method}")(*arguments, **options), limit)

        return asyncio.run_coroutine_threadsafe(transfer(), self.fs.loop).result()

    def arrow(self) -> PyFileSystem:
        """Return the same file system for Arrow's readers."""
        return PyFileSystem(_Arrow(self))


class _Ranges(io.RawIOBase):
    """A seekable reader of an object, range by range."""

    def __init__(self, remote: Remote, path: str, size: int) -> None:
        self._remote, self._path, self._size, self._at = remote, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        data = self._remote.read_range(self._path, self._at, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Arrow(FSSpecHandler):  # type: ignore[misc]
    def __init__(self, remote: Remote) -> None:
        super().__init__(remote.fs)
        self._remote = remote

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(self._remote.open(path), mode="r")


def stamp(info: Mapping[str, Any]) -> str:
    """Return a local file's modification time, a bucket's ETag, or the file system's equivalent."""
    return str(next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "updated") if key in info), ""))
