"""Sizes and checksums of a checkpoint's files: written, verified

    write_summed(path, write)    a file, and its size and SHA-256, computed from the bytes handed to the disk
    seal(content)                checkpoint.json with a checksum of its own
    problem_of(folder, …)        what is wrong with a checkpoint, or None

torch.load takes flipped bits without an error, so every file is compared with its checksum before it is loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final, TypedDict

from capstan.pipeline.storage.local import as_disk_full

MARK: Final = "checkpoint.json"
_SEAL: Final = "sum"  # of the rest of checkpoint.json
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CHUNK: Final = 4 << 20  # bytes


class FileSum(TypedDict):
    """Size and checksum of a file."""

    bytes: int
    sha256: str


class _Summed(io.RawIOBase):
    """A file that is written once, in order, while its checksum is computed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0
        self.error: OSError | None = None  # torch replaces it by an error of its own

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(data)
        self._size += len(data)
        return len(data)

    def sum(self) -> FileSum:
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def write_summed(path: Path, write: Callable[[Any], object]) -> FileSum:
    """Let `write` fill the new file `path`; return its size and checksum.

    On failure the file is removed. Raises DiskFull, which names the folder, if the disk is full.
    """
    try:
        with path.open("wb") as file:
            summed = _Summed(file)
            try:
                write(summed)
            except RuntimeError:
                if summed.error is None:
                    raise
                raise summed.error from None
    except OSError as error:
        path.unlink(missing_ok=True)
        raise as_disk_full(error, path.parent) or error from None
    return summed.sum()


def seal(content: dict[str, Any]) -> bytes:
    """Return checkpoint.json with `content` and a checksum of it."""
    return json.dumps({**content, _SEAL: _sum_of(content)}, indent=1).encode()


def _sum_of(content: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(content))  # as a reader sees it
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_mark(folder: Path) -> dict[str, Any]:
    """Return the content of checkpoint.json. Raises ValueError if it is damaged."""
    content = json.loads((folder / MARK).read_bytes())
    if not isinstance(content, dict):
        raise ValueError("not an object")
    expected = content.pop(_SEAL, None)
    if expected is None and "files" in content:
        raise ValueError("its checksum is missing")
    if expected is not None and expected != _sum_of(content):
        raise ValueError("its checksum differs")
    return content


def problem_of(folder: Path, rank: int = 0, world: int = 1) -> str | None:
    """Return what is wrong with the checkpoint in `folder`, naming the file, or None if all is well.

    Of `world` workers each verifies its share of the files. A checkpoint of an earlier version has no checksums: only
    its checkpoint.json is verified.
    """
    try:
        files: dict[str, FileSum] = read_mark(folder).get("files", {})
        shares = [(name, int(expected["bytes"]), expected["sha256"]) for name, expected in sorted(files.items())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / MARK}: {error}"
    for name, size, checksum in shares[rank::world]:
        path = folder / name
        if not _NAME.fullmatch(name):
            return f"{folder / MARK}: {name!r} is not a file name"
        try:
            found = path.stat().st_size
            if found != size:
                return f"{path}: {found} bytes instead of {size}"
            if sha256_of_file(path) != checksum:
                return f"{path}: its checksum differs"
        except FileNotFoundError:
            return f"{path}: is missing"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror or error})"
    return None


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it no longer counts; return its new path."""
    target = folder.with_name(f"damaged-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}-{number}")
    folder.rename(target)
    return target
