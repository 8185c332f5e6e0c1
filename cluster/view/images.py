"""Keys → JPEGs and thumbnails, read by byte range and kept in bounded memory"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from capstan.pipeline.report.query import Row, Rows
from capstan.pipeline.report.thumbnails import find_images, shrink

_CACHE_BYTES: Final = 96 << 20
_QUALITY: Final = 82
_ROWS: Final = 10_000  # remembered


class Images:
    """Images of rows; safe to call from several threads."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes = 0
        self._coming: dict[tuple[str, int], threading.Event] = {}  # set when the load that reads them has ended
        self._shown: OrderedDict[str, Row] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, row: Row, side: int) -> bytes | None:
        """Return a row's JPEG, at most `side` pixels long (0: as it is stored), or None if there is none to show."""
        with self._lock:
            coming = self._coming.get((row.key, side))
        if coming is not None:
            coming.wait()
        found = self._known((row.key, side))
        if found is None:
            self.load([row], side)
            found = self._known((row.key, side))
        return found

    def load(self, rows: Sequence[Row], side: int) -> None:
        """Read the images of several rows at once: each tar is opened once."""
        ended = threading.Event()
        with self._lock:
            missing = [r for r in rows if (r.key, side) not in self._kept and (r.key, side) not in self._coming]
            self._coming |= {(row.key, side): ended for row in missing}
        try:
            for key, jpeg in find_images(self._rows, missing).items():
                data = jpeg if side == 0 else _thumbnail(jpeg, side)
                if data is not None:
                    self._keep((key, side), data)
        finally:
            with self._lock:
                for row in missing:
                    self._coming.pop((row.key, side), None)
            ended.set()

    def remember(self, rows: Iterable[Row]) -> None:
        """Keep rows whose images a page is going to ask for, so that none is looked up by its key."""
        with self._lock:
            for row in rows:
                self._shown[row.key] = row
                self._shown.move_to_end(row.key)
            while len(self._shown) > _ROWS:
                self._shown.popitem(last=False)

    def remembered(self, key: str) -> Row | None:
        """Return the row of a key if a page has shown it lately."""
        with self._lock:
            return self._shown.get(key)

    def _known(self, name: tuple[str, int]) -> bytes | None:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            return self._kept.get(name)

    def _keep(self, name: tuple[str, int], data: bytes) -> None:
        with self._lock:
            self._bytes += len(data) - len(self._kept.pop(name, b""))
            self._kept[name] = data
            while self._bytes > _CACHE_BYTES and len(self._kept) > 1:
                self._bytes -= len(self._kept.popitem(last=False)[1])


def _thumbnail(jpeg: bytes, side: int) -> bytes | None:
    small = shrink(jpeg, side)
    if small is None:
        return None
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
