"""Storage: folders of finished files, on a disk or in a bucket

This is the only module that imports fsspec. Everything written appears under its final name whole or not at all:
locally by a temporary name, fsync and rename; in a bucket because an object exists only once its upload has completed.
Nothing here relies on conditional puts, or on listings that show *other* writers' files at once.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
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

from capstan.pipeline.errors import DamagedFile, DiskFull, RecipeError, StorageError
from capstan.pipeline.storage.listing import (
    Batches,
    SourceFile,
    file_at,
    in_batches,
    is_macos_file,
    matching,
    on_disk,
    walk,
)
from capstan.pipeline.storage.local import PARTIAL, Local
from capstan.pipeline.storage.remote import Remote, stamp

_HASH_IN_NAME = re.compile(r"staged/.*-([0-9a-f]{16})\.parquet$")  # the start of the file's SHA-256

_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")  # control characters, and what other systems read as a slash
_LONGEST_NAME = 1024  # characters: S3 has no longer keys
_LONGEST_PART = 255  # bytes: no file system has longer names
_AT_ONCE = 32  # objects in flight when many small ones are read or removed

T = TypeVar("T")


class Storage:
    """A folder at `url`; names are relative to it, with forward slashes. Can be pickled to workers.

    `field` is the recipe's field that the URL came from; errors that the user can fix name it. Every method raises
    FileNotFoundError for a file that does not exist, DiskFull for a full disk, and StorageError for a bucket on which
    the operation fails.
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
        """Return the folder `name` inside this one."""
        return Storage(f"{self.url}/{name}", self.options, field=self.field)

    def _path(self, name: str) -> str:
        """Return the full path of a name. Raises RecipeError for a name that leads out of this folder.

        Names come from manifests and markers too, which a stranger may have written.
        """
        if not name:
            return self._root
        if not is_inside(name):
            problem = f"{self.url} refers to a file {name[:200]!r}, which is not a name inside it"
            raise RecipeError(self.field, problem, "check who wrote this folder; it may be damaged, or made to do harm")
        return f"{self._root}/{name}"

    def _name(self, path: str) -> str:
        return path.removeprefix(self._root.rstrip("/") + "/")

    def local_path(self, name: str = "") -> Path | None:
        """Return the path of `name` on this machine's disk; None for a bucket."""
        return Path(self._path(name)) if isinstance(self._files, Local) else None

    # Reading -----------------------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        return self._files.exists(self._path(name))

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return self._files.size(self._path(name))

    def read(self, name: str) -> bytes:
        return self._files.read(self._path(name))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop) of a file, which must have them."""
        return self._files.read_range(self._path(name), start, stop)

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return small files by name; from a bucket many are read at once."""
        names = list(names)
        return dict(zip(names, self._each(self.read, names), strict=True))

    def open(self, name: str) -> BinaryIO:
        """Return a seekable reader of a finished file."""
        return self._files.open(self._path(name))

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all finished files at any depth below `folder`, sorted, relative to this storage.

        Links are neither listed nor followed.
        """
        if isinstance(self._files, Local) and self._leads_through_link(folder):
            return []
        return sorted(self._name(path) for path in self._files.find(self._path(folder)))

    def links(self) -> list[str]:
        """Return the names of all links at any depth, sorted; a bucket has none."""
        found = self._files.links(self._root) if isinstance(self._files, Local) else []
        return sorted(self._name(path) for path in found)

    def _leads_through_link(self, folder: str) -> bool:
        parts = folder.split("/") if folder else []
        return any(Path(self._path("/".join(parts[:depth]))).is_symlink() for depth in range(1, len(parts) + 1))

    def path(self, name: str) -> str:
        """Return the full path or URL of a file, for messages."""
        return f"{self.url}/{name}"

    def read_json(self, name: str, hint: str) -> dict[str, Any]:
        """Read a JSON object. Raises DamagedFile with `hint` if it is not one."""
        try:
            value = json.loads(self.read(name))
        except ValueError as error:
            raise DamagedFile(self.path(name), f"not JSON: {error}", hint) from None
        if not isinstance(value, dict):
            raise DamagedFile(self.path(name), "not a JSON object", hint)
        return value

    def read_table(self, name: str, columns: list[str] | None = None, *, sha256: str = "") -> pa.Table:
        """Read a Parquet file, or those of the `columns` that it has.

        Raises DamagedFile if its content is not what was written: by `sha256` if the caller knows it, by the hash that
        the name of a staged table ends with, and by the checksums of its pages.
        """
        try:
            data = self.read(name)
        except FileNotFoundError as error:  # with a sum, a manifest lists it
            raise DamagedFile(self.path(name), "it is missing") if sha256 else error from None
        expected = sha256 or ((named := _HASH_IN_NAME.match(name)) and named[1]) or ""
        if expected and not hashlib.sha256(data).hexdigest().startswith(expected):
            raise DamagedFile(self.path(name), "its SHA-256 is not that of what was written")
        try:
            return pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DamagedFile(self.path(name), f"cannot be read as Parquet: {error}") from None

    def dataset(self, names: list[str], schema: pa.Schema) -> Any:
        """Return Parquet files of one schema as a dataset to scan, without opening them now."""
        import pyarrow.dataset as ds  # imports pandas, which takes a second to load

        if isinstance(self._files, Local):
            self._files.check_regular(map(self._path, names))
        fs = self._files.arrow() if isinstance(self._files, Remote) else None
        scan = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        form = ds.ParquetFileFormat(default_fragment_scan_options=scan)
        return ds.dataset([self._path(name) for name in names], schema=schema, format=form, filesystem=fs)

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
        """Remove files; those that do not exist are ignored."""
        self._each(lambda name: self._files.delete(self._path(name)), names)

    def sweep(self) -> int:
        """Remove temporary files of writers that were killed; return how many.

        Those of writers that may still run are kept.
        """
        return self._files.sweep(self._root)

    def _each(self, action: Callable[[str], T], names: Iterable[str]) -> list[T]:
        if isinstance(self._files, Local):
            return [action(name) for name in names]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(action, names))

    def check_reachable(self) -> None:
        """Raise RecipeError unless a file can be looked up, whether it exists or not."""
        try:
            self.exists("dataset.json")
        except (OSError, StorageError) as error:
            message = error.problem if isinstance(error, StorageError) else str(error)
            hint = "check the URL, the bucket, its permissions, storage.endpoint_url and credentials"
            raise RecipeError(self.field, f"cannot reach {self.url} ({message})", hint) from None

    def check_links(self) -> None:
        """Raise RecipeError naming a link below this folder: deleting by such a name would delete elsewhere."""
        if links := self.links():
            problem = f"{self.path(links[0])} is a link, and links inside a dataset are not followed"
            raise RecipeError(self.field, problem, "replace it with the file or folder itself, or remove it")

    def check_writable(self) -> None:
        """Raise RecipeError unless a file can be written here, read back and removed; DiskFull if there is no space."""
        name = f"{PARTIAL}check-{uuid.uuid4().hex}"
        try:
            self.write(name, b"capstan")
            self.read(name)
            self.delete(name)
        except DiskFull:
            raise
        except (OSError, StorageError) as error:
            message = error.problem if isinstance(error, StorageError) else str(error)
            cause = error.__cause__ if isinstance(error, StorageError) else error
            if isinstance(cause, PermissionError):
                problem, hint = "no permission to write to", "grant it, or choose another folder"
            elif isinstance(self._files, Local):
                problem, hint = "cannot write to", "make the folder writable, or choose another one"
            else:
                problem, hint = "cannot write to", "check the URL, the bucket, storage.endpoint_url and credentials"
            raise RecipeError(self.field, f"{problem} {self.url} ({message})", hint) from None


def is_inside(name: str) -> bool:
    """Return whether a name with forward slashes, joined to a folder, stays within it on every system.

    >>> [is_inside(name) for name in ("unet/model.bin", ".nv-meta/x", "a..b", "a b/ü")]
    [True, True, True, True]
    >>> [is_inside(name) for name in ("", ".", "..", "a/../../b", "/etc/passwd", "a\\\\b", "a//b", "a/", "a\\0")]
    [False, False, False, False, False, False, False, False, False]
    """
    parts = name.split("/")
    if len(name) > _LONGEST_NAME or any(len(part.encode("utf-8", "replace")) > _LONGEST_PART for part in parts):
        return False
    return not any(part in ("", ".", "..") or _UNSAFE.search(part) for part in parts)


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a table as Parquet (zstd, with a checksum of each page). The same table yields the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def find_files(path: str, options: Mapping[str, Any], *, field: str = "source.path") -> list[SourceFile]:
    """Return the files that `path` names: a file, a glob, or all files in a folder at any depth; sorted by path.

    Raises RecipeError naming `field` if there is no file, or if the path cannot be read.
    """
    files = (file for batch in list_files(path, options, field=field) for file in batch)
    return sorted(files, key=lambda file: file.path)


def list_files(path: str, options: Mapping[str, Any], *, field: str = "source.path") -> Batches:
    """Yield the same files in batches; on a disk, memory holds the names of one folder at a time."""
    hint = "check the path, the bucket and its permissions"
    try:
        fs, root = _file_system(path, options)
    except Exception as error:  # noqa: BLE001 - some file systems connect here, with errors of their clients' own
        raise RecipeError(field, f"cannot read {path} ({error})", hint) from None
    anything = False
    try:
        for batch in _on_disk(root) if isinstance(fs, LocalFileSystem) else _in_bucket(Remote(fs, hint), root):
            anything = anything or bool(batch)
            yield batch
    except StorageError as error:
        raise RecipeError(field, f"cannot {error.action} ({error.problem})", hint) from None
    except (OSError, ValueError) as error:  # e.g. no such bucket, or a glob like a**b
        raise RecipeError(field, f"cannot read {path} ({error})", hint) from None
    if not anything:
        raise RecipeError(field, f"no file at {path}", "check the path; it may be a glob like data/*.parquet")


def _on_disk(root: str) -> Batches:
    """List a path without fsspec, for which a link is neither a file nor a folder."""
    if Path(root).is_dir():
        yield from walk(root)
    elif Path(root).exists():
        yield [file for file in [file_at(root, named=True)] if file]
    elif re.search(r"[*?[]", root):
        folder, pattern = _literal(root, lambda path: Path(path).is_dir())
        depth = None if "**" in pattern else pattern.count("/") + 1
        yield from matching(re.compile(glob_translate(f"{glob.escape(folder)}/{pattern}")), folder, depth)


def _literal(root: str, is_folder: Callable[[str], bool]) -> tuple[str, str]:
    """Split a glob after the folders that exist as they are spelled: a name may hold brackets."""
    parts = root.split("/")
    for count in range(len(parts) - 1, 0, -1):
        folder = "/".join(parts[:count])
        if "*" not in folder and "?" not in folder and (not folder or is_folder(folder)):
            return folder, "/".join(parts[count:])
    return "", root.lstrip("/")


def _in_bucket(remote: Remote, root: str) -> Batches:
    try:
        info = remote.info(root)
    except FileNotFoundError:
        if "[" in root:
            folder, pattern = _literal(root, remote.exists)
            root = f"{glob.escape(folder)}/{pattern}" if folder else root
        infos = {name: info for name, info in remote.glob(root).items() if info["type"] == "file"}
    else:
        infos = {root: info} if info["type"] == "file" else remote.details(root)
    files = [
        SourceFile(remote.fs.unstrip_protocol(name), int(info["size"] or 0), stamp(info), name == root)
        for name, info in infos.items()
        if name == root or not is_macos_file(name.removeprefix(root))
    ]
    return in_batches(files)


def open_file(path: str, options: Mapping[str, Any], *, ahead: bool = True) -> BinaryIO:
    """Return a reader of a user's file; `ahead` makes it fetch more than is requested, for sequential reading."""
    if here := on_disk(path):
        return Local().open(here)
    files, root = _connect(path, options)
    return files.open(root, ahead=ahead)


def read_ranges(ranges: Sequence[tuple[str, int, int]], options: Mapping[str, Any]) -> list[bytes | Exception]:
    """Return bytes [start, stop) of users' files on one file system, given as (URL, start, stop).

    Many ranges are requested at once. If one cannot be read, its error is returned in its place: only its row fails.
    Raises if the file system cannot be opened at all: a missing package is not the fault of a row.
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
    """Return the file system of a URL and the path in it."""
    fs, root = _file_system(url, options)
    if isinstance(fs, LocalFileSystem):
        return Local(), root
    hint = "check that the storage answers, then run the same command again: it resumes"
    return Remote(fs, hint), root


def _file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it.

    Listings are never cached, since workers write too. S3: servers other than Amazon's send the checksum of the whole
    object with a range, which botocore then refuses; Capstan checks its own files by SHA-256.
    """
    s3 = url.startswith(("s3://", "s3a://"))
    if "://" in url and not url.startswith(("file://", "local://")):
        options = {"use_listings_cache": False, **options}
    if s3:
        config = {
            "response_checksum_validation": "when_required",
            "request_checksum_calculation": "when_required",
            "retries": {"mode": "standard", "total_max_attempts": 3},  # of one request; see retry.py
        }
        options = {**options, "config_kwargs": config | options.get("config_kwargs", {})}
    fs, root = url_to_fs(url, **options)
    if s3:
        fs.retries = 2  # of one page or body; s3fs's default of 5 would multiply with the other layers' retries
    return fs, root


def _rebuild(url: str, options: dict[str, Any], field: str) -> Storage:
    return Storage(url, options, field=field)
