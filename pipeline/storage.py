"""Folders of finished files, local or in a bucket: the one door to fsspec.

Everything written appears under its final name whole or not at all: locally by a temporary name, fsync and rename;
in a bucket because an object exists only once its upload has completed. Nothing here relies on conditional puts or on
listing being more than eventually right about *other* writers.
"""

from __future__ import annotations

import io
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from pipeline.errors import RecipeError

_PARTIAL = ".partial-"  # part of every temporary name; never listed


class Storage:
    """A folder at `url`; names are relative to it, with forward slashes. Can be pickled to workers.

    `field` is the recipe's field that the URL came from; errors that the user can mend name it.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, *, field: str = "dataset") -> None:
        self.url, self.options, self.field = str(url).rstrip("/") or "/", dict(options or {}), field
        try:
            self._fs, self._root = _connect(self.url, self.options)
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(
                field, f"cannot open {self.url}: {error}", "use a folder or a URL like s3://bucket/x"
            ) from None
        self._local = isinstance(self._fs, fsspec.implementations.local.LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.url, self.options, self.field)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def folder(self, name: str) -> Storage:
        """The folder `name` inside this one."""
        return Storage(f"{self.url}/{name}", self.options, field=self.field)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def local_path(self, name: str = "") -> Path | None:
        """Where `name` lies on this machine's disk, or None in a bucket."""
        return Path(self._path(name)) if self._local else None

    # Reading -----------------------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        return bool(self._fs.exists(self._path(name)))

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        return int(self._fs.size(self._path(name)))

    def read(self, name: str) -> bytes:
        return bytes(self._fs.cat_file(self._path(name)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file."""
        return bytes(self._fs.cat_file(self._path(name), start=start, end=stop))

    def open(self, name: str) -> BinaryIO:
        """A seekable reader over a finished file."""
        return self._fs.open(self._path(name), "rb")  # type: ignore[no-any-return]

    def names(self, folder: str = "") -> list[str]:
        """Names of all finished files at any depth below `folder`, sorted, relative to this storage."""
        self._fs.invalidate_cache()
        root = self._root.rstrip("/") + "/"
        found = self._fs.find(self._path(folder))
        return sorted(path.removeprefix(root) for path in found if _PARTIAL not in path)

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return pq.ParquetFile(io.BytesIO(self.read(name))).read(columns=columns)

    def dataset(self, names: list[str], schema: pa.Schema) -> Any:
        """Parquet files of one schema as a dataset to scan, without opening them now."""
        import pyarrow.dataset as ds  # brings pandas along, which takes a second to load

        return ds.dataset([self._path(name) for name in names], schema=schema, format="parquet", filesystem=self._fs)

    # Writing -----------------------------------------------------------------------------------------------------

    def write(self, name: str, data: bytes) -> None:
        """Publish `data` as `name`, whole or not at all."""
        if not self._local:
            self._fs.pipe_file(self._path(name), data)
            return
        with _Publish(Path(self._path(name))) as partial, partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def put(self, source: Path, name: str) -> None:
        """Publish the finished local file `source` as `name`; `source` may be moved away."""
        if not self._local:
            self._fs.put_file(str(source), self._path(name))
            return
        with _Publish(Path(self._path(name))) as partial:
            shutil.move(source, partial)  # a rename where both lie on one disk
            with partial.open("rb") as file:
                os.fsync(file.fileno())

    def write_table(self, name: str, table: pa.Table) -> None:
        """Publish a table as Parquet (zstd); the same table gives the same bytes."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.write(name, buffer.getvalue())

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        if self._fs.exists(self._path(name)):
            self._fs.rm_file(self._path(name))

    def check_writable(self) -> None:
        """Raise RecipeError unless a file can be written here, read back and removed."""
        name = f"{_PARTIAL}check-{uuid.uuid4().hex}"
        try:
            self.write(name, b"capstan")
            self.read(name)
            self.delete(name)
        except PermissionError as error:
            raise RecipeError(
                self.field, f"no permission to write to {self.url} ({error})", "grant it, or name another place"
            ) from None
        except OSError as error:
            raise RecipeError(
                self.field,
                f"cannot write to {self.url} ({error})",
                "check the address, the bucket and storage.endpoint_url",
            ) from None
        except Exception as error:  # noqa: BLE001 - every client library has its own errors for an unreachable endpoint
            raise RecipeError(
                self.field,
                f"cannot reach {self.url} ({error})",
                "check the bucket, storage.endpoint_url and credentials",
            ) from None


@dataclass(frozen=True)
class SourceFile:
    """A user's file: its path or URL, size in bytes, and a stamp that changes when its content does."""

    path: str
    size: int
    stamp: str


def find_files(path: str, options: Mapping[str, Any], *, field: str = "source.path") -> list[SourceFile]:
    """The files that `path` names: a file, a glob, or all files in a folder at any depth; sorted by path.

    Raises RecipeError naming `field` where there is nothing, or where it cannot be read.
    """
    try:
        fs, root = _connect(path, options)
        if fs.isfile(root):
            found = {root: fs.info(root)}
        elif fs.isdir(root):
            found = fs.find(root, detail=True)
        else:
            found = {name: info for name, info in fs.glob(root, detail=True).items() if info["type"] == "file"}
    except Exception as error:  # noqa: BLE001 - every file system has its own errors for an unreachable place
        raise RecipeError(
            field, f"cannot read {path} ({error})", "check the path, the bucket and its permissions"
        ) from None
    if not found:
        raise RecipeError(field, f"no file at {path}", "check the path; globs like data/*.parquet are welcome")
    local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
    files = [
        SourceFile(name if local else fs.unstrip_protocol(name), int(info["size"]), _stamp(info))
        for name, info in found.items()
    ]
    return sorted(files, key=lambda file: file.path)


def open_file(path: str, options: Mapping[str, Any], *, ahead: bool = True) -> BinaryIO:
    """A reader over a user's file; `ahead` makes it fetch more than is asked for, for reading from front to back."""
    fs, root = _connect(path, options)
    return fs.open(root, "rb", cache_type="readahead" if ahead else "none")  # type: ignore[no-any-return]


def read_ranges(ranges: Sequence[tuple[str, int, int]], options: Mapping[str, Any]) -> list[bytes | Exception]:
    """Bytes [start, stop) of users' files on one file system, as (URL, start, stop): asked for at once where it can."""
    fs, _ = _connect(ranges[0][0], options)
    paths, starts, stops = zip(*((fs._strip_protocol(url), start, stop) for url, start, stop in ranges), strict=True)
    try:
        return list(fs.cat_ranges(list(paths), list(starts), list(stops), on_error="return"))
    except Exception as error:  # noqa: BLE001 - some file systems raise what others return, each its own kind
        return [error] * len(ranges)


def _connect(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    S3: servers other than Amazon's answer a range with the checksum of the whole object, which botocore then refuses;
    what Capstan writes is checked by its own SHA-256.
    """
    if url.startswith(("s3://", "s3a://")):
        lenient = {"response_checksum_validation": "when_required", "request_checksum_calculation": "when_required"}
        options = {**options, "config_kwargs": lenient | options.get("config_kwargs", {})}
    return url_to_fs(url, **options)  # type: ignore[no-any-return]


def _stamp(info: Mapping[str, Any]) -> str:
    """A local file's time of change, a bucket's ETag, or whatever the file system has instead."""
    return str(next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "updated") if key in info), ""))


class _Publish:
    """A temporary name beside `target` that becomes `target` on success and vanishes on failure."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(f"{_PARTIAL}{uuid.uuid4().hex}-{target.name}")

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.partial.replace(self.target)
        else:
            self.partial.unlink(missing_ok=True)


def _rebuild(url: str, options: dict[str, Any], field: str) -> Storage:
    return Storage(url, options, field=field)
