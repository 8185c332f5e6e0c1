"""Folders of finished files, local or in a bucket: the one door to fsspec.

Everything written appears under its final name whole or not at all: locally by a temporary name, fsync and rename;
in a bucket because an object exists only once its upload has completed. Nothing here relies on conditional puts or on
listing being more than eventually right about *other* writers.
"""

from __future__ import annotations

import io
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from capstan.pipeline.errors import DiskFull, RecipeError, StorageError
from capstan.pipeline.storage.listing import Batches, SourceFile, file_at, in_batches, matching, on_disk, walk
from capstan.pipeline.storage.local import PARTIAL, Local
from capstan.pipeline.storage.remote import Remote, stamp

_AT_ONCE = 32  # objects in flight where many small ones are read or removed

T = TypeVar("T")


class Storage:
    """A folder at `url`; names are relative to it, with forward slashes. Can be pickled to workers.

    `field` is the recipe's field that the URL came from; errors that the user can mend name it. All that is done here
    raises FileNotFoundError for a file that is not there, DiskFull where a disk is, and StorageError for a bucket that
    does not do as asked.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, *, field: str = "dataset") -> None:
        self.url, self.options, self.field = str(url).rstrip("/") or "/", dict(options or {}), field
        try:
            self._files, self._root = _connect(self.url, self.options)
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(
                field, f"cannot open {self.url}: {error}", "use a folder or a URL like s3://bucket/x"
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.url, self.options, self.field)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def folder(self, name: str) -> Storage:
        """The folder `name` inside this one."""
        return Storage(f"{self.url}/{name}", self.options, field=self.field)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _name(self, path: str) -> str:
        return path.removeprefix(self._root.rstrip("/") + "/")

    def local_path(self, name: str = "") -> Path | None:
        """Where `name` lies on this machine's disk, or None in a bucket."""
        return Path(self._path(name)) if isinstance(self._files, Local) else None

    # Reading -----------------------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        return self._files.exists(self._path(name))

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        return self._files.size(self._path(name))

    def read(self, name: str) -> bytes:
        return self._files.read(self._path(name))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, which must have them."""
        return self._files.read_range(self._path(name), start, stop)

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """Small files by name, many at once from a bucket."""
        names = list(names)
        return dict(zip(names, self._each(self.read, names), strict=True))

    def open(self, name: str) -> BinaryIO:
        """A seekable reader over a finished file."""
        return self._files.open(self._path(name))

    def names(self, folder: str = "") -> list[str]:
        """Names of all finished files at any depth below `folder`, sorted, relative to this storage."""
        return sorted(self._name(path) for path in self._files.find(self._path(folder)))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return pq.ParquetFile(io.BytesIO(self.read(name))).read(columns=columns)

    def dataset(self, names: list[str], schema: pa.Schema) -> Any:
        """Parquet files of one schema as a dataset to scan, without opening them now."""
        import pyarrow.dataset as ds  # brings pandas along, which takes a second to load

        fs = self._files.arrow() if isinstance(self._files, Remote) else None
        return ds.dataset([self._path(name) for name in names], schema=schema, format="parquet", filesystem=fs)

    # Writing -----------------------------------------------------------------------------------------------------

    def write(self, name: str, data: bytes) -> None:
        """Publish `data` as `name`, whole or not at all."""
        self._files.write(self._path(name), data)

    def put(self, source: Path, name: str) -> None:
        """Publish the finished local file `source` as `name`; `source` may be moved away."""
        self._files.put(source, self._path(name))

    def write_table(self, name: str, table: pa.Table) -> None:
        """Publish a table as Parquet."""
        self.write(name, parquet_bytes(table))

    def delete(self, *names: str) -> None:
        """Remove files, those that are there."""
        self._each(lambda name: self._files.delete(self._path(name)), names)

    def sweep(self) -> int:
        """Remove what killed writers left under temporary names, unless they may still run; gives how many files."""
        return self._files.sweep(self._root)

    def _each(self, action: Callable[[str], T], names: Iterable[str]) -> list[T]:
        if isinstance(self._files, Local):
            return [action(name) for name in names]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(action, names))

    def check_reachable(self) -> None:
        """Raise RecipeError unless it can be asked for a file, whether that is there or not."""
        try:
            self.exists("dataset.json")
        except (OSError, StorageError) as error:
            said = error.problem if isinstance(error, StorageError) else str(error)
            hint = "check the address, the bucket, its permissions, storage.endpoint_url and credentials"
            raise RecipeError(self.field, f"cannot reach {self.url} ({said})", hint) from None

    def check_writable(self) -> None:
        """Raise RecipeError unless a file can be written here, read back and removed; DiskFull if there is no room."""
        name = f"{PARTIAL}check-{uuid.uuid4().hex}"
        try:
            self.write(name, b"capstan")
            self.read(name)
            self.delete(name)
        except DiskFull:
            raise
        except (OSError, StorageError) as error:
            cause, said = (error.__cause__, error.problem) if isinstance(error, StorageError) else (error, str(error))
            if isinstance(cause, PermissionError):
                problem, hint = "no permission to write to", "grant it, or name another place"
            else:
                problem, hint = "cannot write to", "check the address, the bucket, storage.endpoint_url and credentials"
            raise RecipeError(self.field, f"{problem} {self.url} ({said})", hint) from None


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as Parquet (zstd); the same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def find_files(path: str, options: Mapping[str, Any], *, field: str = "source.path") -> list[SourceFile]:
    """The files that `path` names: a file, a glob, or all files in a folder at any depth; sorted by path.

    Raises RecipeError naming `field` where there is nothing, or where it cannot be read.
    """
    found = (file for some in list_files(path, options, field=field) for file in some)
    return sorted(found, key=lambda file: file.path)


def list_files(path: str, options: Mapping[str, Any], *, field: str = "source.path") -> Batches:
    """The same in batches; on a disk memory does not grow with the folder's size, but for one folder's names."""
    hint = "check the path, the bucket and its permissions"
    try:
        fs, root = _file_system(path, options)
    except Exception as error:  # noqa: BLE001 - some file systems connect at once, with errors of their clients' own
        raise RecipeError(field, f"cannot read {path} ({error})", hint) from None
    anything = False
    try:
        for some in _on_disk(root) if isinstance(fs, LocalFileSystem) else _in_bucket(Remote(fs, hint), root):
            anything = anything or bool(some)
            yield some
    except StorageError as error:
        raise RecipeError(field, f"cannot {error.action} ({error.problem})", hint) from None
    except (OSError, ValueError) as error:  # no such bucket, say, or a glob like a**b
        raise RecipeError(field, f"cannot read {path} ({error})", hint) from None
    if not anything:
        raise RecipeError(field, f"no file at {path}", "check the path; globs like data/*.parquet are welcome")


def _on_disk(root: str) -> Batches:
    """fsspec itself calls a link neither a file nor a folder."""
    if Path(root).is_dir():
        yield from walk(root)
    elif Path(root).exists():
        yield [file for file in [file_at(root, named=True)] if file]
    elif magic := re.search(r"[*?[]", root):
        folder = root[: magic.start()].rpartition("/")[0] or "/"
        depth = None if "**" in root else root.count("/") - folder.rstrip("/").count("/")
        yield from matching(re.compile(glob_translate(root)), folder, depth)


def _in_bucket(remote: Remote, root: str) -> Batches:
    try:
        info = remote.info(root)
    except FileNotFoundError:
        found = {name: info for name, info in remote.glob(root).items() if info["type"] == "file"}
    else:
        found = {root: info} if info["type"] == "file" else remote.details(root)
    files = [
        SourceFile(remote.fs.unstrip_protocol(name), int(info["size"] or 0), stamp(info), name == root)
        for name, info in found.items()
    ]
    return in_batches(files)


def open_file(path: str, options: Mapping[str, Any], *, ahead: bool = True) -> BinaryIO:
    """A reader over a user's file; `ahead` makes it fetch more than is asked for, for reading from front to back."""
    if here := on_disk(path):
        return Local().open(here)
    files, root = _connect(path, options)
    return files.open(root, ahead=ahead)


def read_ranges(ranges: Sequence[tuple[str, int, int]], options: Mapping[str, Any]) -> list[bytes | Exception]:
    """Bytes [start, stop) of users' files on one file system, as (URL, start, stop): many are asked for at once.

    A range that cannot be read is its own row's trouble, and its error stands in its place. Raises where the file
    system cannot be opened at all: no row is to blame for a package that is missing.
    """

    def read(range_: tuple[str, int, int]) -> bytes | Exception:
        url, start, stop = range_
        files, root = _connect(url, options)
        try:
            return files.read_range(root, start, stop)
        except (OSError, StorageError) as error:
            return error

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(read, ranges))


def _connect(url: str, options: Mapping[str, Any]) -> tuple[Local | Remote, str]:
    """What does the work for a URL, and the path in it."""
    fs, root = _file_system(url, options)
    if isinstance(fs, LocalFileSystem):
        return Local(), root
    hint = "check that the storage answers, and run the same command again: it goes on"
    return Remote(fs, hint), root


def _file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Listings are never cached, since workers write too. S3: servers other than Amazon's answer a range with the checksum
    of the whole object, which botocore then refuses; what Capstan writes is checked by its own SHA-256.
    """
    s3 = url.startswith(("s3://", "s3a://"))
    if "://" in url and not url.startswith(("file://", "local://")):
        options = {"use_listings_cache": False, **options}
    if s3:
        config = {
            "response_checksum_validation": "when_required",
            "request_checksum_calculation": "when_required",
            "retries": {"mode": "standard", "total_max_attempts": 3},  # of one request; see pipeline.retry
        }
        options = {**options, "config_kwargs": config | options.get("config_kwargs", {})}
    fs, root = url_to_fs(url, **options)
    if s3:
        fs.retries = 2  # of one page or body; s3fs's own 5 would multiply with those of the layers above and below
    return fs, root


def _rebuild(url: str, options: dict[str, Any], field: str) -> Storage:
    return Storage(url, options, field=field)
