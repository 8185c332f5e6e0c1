"""Safetensors files of latents and text states, with a checksum of all their bytes

The header's metadata holds `file_sha256`: the SHA-256 of the file with zeros in place of it. So a file that is copied,
renamed or written again by a takedown always carries its own checksum. Files of earlier versions have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Final

import numpy as np

from capstan.pipeline.errors import DamagedFile

_KEY: Final = "file_sha256"
_KNOWN: Final = {_KEY, "shard_sha256", "captions", "keys", "format"}  # names in the metadata
_ZEROS: Final = b"0" * 64
_FIELD: Final = f'"{_KEY}":"'.encode()
_LONGEST: Final = 100 << 20  # bytes of a header; safetensors itself refuses longer ones
_CHUNK: Final = 4 << 20  # bytes


def save(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file of `tensors` with its checksum in the metadata."""
    from safetensors.numpy import save as save_tensors

    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}  # it ignores strides
    data = _in_order(save_tensors(whole, metadata={**metadata, _KEY: _ZEROS.decode()}))
    length = int.from_bytes(data[:8], "little")
    start = data.index(_FIELD, 8, 8 + length) + len(_FIELD)
    data[start : start + 64] = hashlib.sha256(data).hexdigest().encode()
    return bytes(data)


def _in_order(data: bytes) -> bytearray:
    """Return a safetensors file with its metadata sorted by name: the library writes it in random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text + data[8 + length :])


def check(raw: np.ndarray | bytes, name: str) -> None:
    """Raise DamagedFile, naming the file `name`, unless its bytes (uint8 [bytes]) are those that were written."""
    view = memoryview(raw.data if isinstance(raw, np.ndarray) else raw) if len(raw) else memoryview(b"")
    length = int.from_bytes(view[:8], "little")
    _check(bytes(view[: 8 + min(length, _LONGEST)]), [view[8 + length :]], name)


def check_file(file: BinaryIO, name: str) -> None:
    """Raise DamagedFile as `check` does, reading the file in pieces."""
    start = file.read(8)
    head = start + file.read(min(int.from_bytes(start, "little"), _LONGEST))
    _check(head, iter(lambda: file.read(_CHUNK), b""), name)


def _check(head: bytes, rest: Iterable[bytes | memoryview] | Iterator[bytes], name: str) -> None:
    """Compare the checksum; `head` is the header with the eight bytes of its length."""
    try:
        if len(head) != 8 + int.from_bytes(head[:8], "little"):
            raise ValueError("it ends within its header")
        metadata: Any = json.loads(head[8:]).get("__metadata__")
        expected, unknown = metadata.get(_KEY), metadata.keys() - _KNOWN
        if unknown:
            raise ValueError(f"unknown metadata: {', '.join(map(repr, sorted(unknown)))}")
    except (ValueError, AttributeError) as error:
        raise DamagedFile(name, f"its header cannot be read: {error}") from None
    if expected is None:
        return
    start = head.find(_FIELD) + len(_FIELD)
    digest = hashlib.sha256(head[:start] + _ZEROS + head[start + 64 :])
    for piece in rest:
        digest.update(piece)
    if digest.hexdigest() != expected:
        raise DamagedFile(name, "its SHA-256 is not that of what was written")
