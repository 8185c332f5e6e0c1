"""CBOR (RFC 8949) from strangers → plain values, with bounds on size, depth and number of items"""

from __future__ import annotations

import struct
from typing import Any, Final

_MOST_BYTES: Final = 64 << 10
_MOST_ITEMS: Final = 4_096
_MOST_DEPTH: Final = 16
_FLOATS: Final = {25: ">e", 26: ">f", 27: ">d"}
_BREAK: Final = object()


def loads(data: bytes) -> Any:
    """Return the first value in `data`; tags are dropped. Raises ValueError for anything that is not sound or too much.

    >>> loads(bytes.fromhex("a163757365 6a6e6f74416c6c6f776564"))
    {'use': 'notAllowed'}
    """
    if len(data) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes of CBOR")
    return _Reader(data).value(0)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._items = data, 0, 0

    def value(self, depth: int, *, may_end: bool = False) -> Any:
        """Return the next value, or _BREAK where a collection of unknown length `may_end`."""
        self._items += 1
        if depth > _MOST_DEPTH or self._items > _MOST_ITEMS:
            raise ValueError("CBOR of too many or too deeply nested items")
        head = self._take(1)[0]
        kind, info = head >> 5, head & 31
        if head == 0xFF and may_end:
            return _BREAK
        if kind == 7:
            return self._simple(info)
        count = None if info == 31 and kind in (2, 3, 4, 5) else self._number(info)
        if kind == 6:
            return self.value(depth + 1)
        if kind in (0, 1):
            assert count is not None
            return count if kind == 0 else -1 - count
        if kind in (2, 3):
            return self._string(kind, count, depth)
        return self._array(count, depth) if kind == 4 else self._map(count, depth)

    def _take(self, size: int) -> bytes:
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError("CBOR ends early")
        return self._data[start : self._at]

    def _number(self, info: int) -> int:
        if info < 24:
            return info
        if info > 27:
            raise ValueError(f"CBOR argument {info}")
        return int.from_bytes(self._take(1 << info - 24), "big")

    def _simple(self, info: int) -> Any:
        if info in _FLOATS:
            (number,) = struct.unpack(_FLOATS[info], self._take(1 << info - 24))
            return number
        if info == 24:
            self._take(1)
        elif info > 24:
            raise ValueError(f"CBOR simple value {info}")
        return {20: False, 21: True}.get(info)

    def _string(self, kind: int, count: int | None, depth: int) -> bytes | str:
        if count is not None:
            raw = self._take(count)
            return raw if kind == 2 else raw.decode("utf-8", "replace")
        parts: list[Any] = []
        while (part := self.value(depth + 1, may_end=True)) is not _BREAK:
            if not isinstance(part, bytes if kind == 2 else str):
                raise ValueError("CBOR string of mixed parts")
            parts.append(part)
        return b"".join(parts) if kind == 2 else "".join(parts)

    def _array(self, count: int | None, depth: int) -> list[Any]:
        values: list[Any] = []
        while count is None or len(values) < count:
            value = self.value(depth + 1, may_end=count is None)
            if value is _BREAK:
                break
            values.append(value)
        return values

    def _map(self, count: int | None, depth: int) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        pairs = 0
        while count is None or pairs < count:
            key = self.value(depth + 1, may_end=count is None)
            if key is _BREAK:
                break
            value = self.value(depth + 1)
            values[key if isinstance(key, str | int | float | bytes | None) else repr(key)] = value
            pairs += 1
        return values
