"""What a running stage has done → one live bar on a terminal, or a plain line every few seconds otherwise; on stderr.

Counts are plain names and numbers. Three spellings are known: `samples` gives the rate, `bytes` the throughput, and
`failed.<reason>` the top reasons for failure; everything else is shown as it is.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_EVERY_S = 5.0
LIVE_EVERY_S = 0.5
_BAR = 24  # characters


class Progress:
    """Shows a stage while the `with` block runs; `advance` it from the work, `poll` brings counts from elsewhere.

    `total` is in units of work (None: unknown), `already` of them were done by an earlier run and count for the bar but
    not for the rate.
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        *,
        already: int = 0,
        poll: Callable[[], Mapping[str, float]] | None = None,
        enabled: bool = True,
        unit: str = "units",
        stream: TextIO | None = None,
    ) -> None:
        self.stage, self.total, self.already, self.unit = stage, total, already, unit
        self.done = already
        self.counts: dict[str, float] = {}
        self._poll, self._enabled = poll, enabled
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, name=f"progress-{stage}", daemon=True)
        self._start = time.monotonic()

    def advance(self, units: int = 1, counts: Mapping[str, float] | None = None) -> None:
        """`units` more are done; `counts` are added to what is shown."""
        self.done += units
        for name, value in (counts or {}).items():
            self.counts[name] = self.counts.get(name, 0) + value

    def __enter__(self) -> Progress:
        if self._enabled:
            if self._console.is_terminal:
                self._live = Live(console=self._console, get_renderable=self._renderable, refresh_per_second=4)
                self._live.start()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._enabled:
            return
        self._stop.set()
        self._thread.join(timeout=5)
        if kind is None:
            self._refresh()
        if self._live is not None:
            self._live.stop()
        elif kind is None:
            self._console.print(self.line(finished=True), markup=False)

    def _tick(self) -> None:
        """Runs in a thread of its own until the block ends."""
        while not self._stop.wait(LIVE_EVERY_S if self._live else PLAIN_EVERY_S):
            self._refresh()
            if self._live is None:
                self._console.print(self.line(), markup=False)

    def _refresh(self) -> None:
        if self._poll is not None:
            self.counts.update(self._poll())

    def _renderable(self) -> Text:
        return Text(self.line(finished=self._stop.is_set()), no_wrap=True, overflow="ellipsis")

    def line(self, finished: bool = False) -> str:
        """The present state as one line of text."""
        seconds = max(time.monotonic() - self._start, 1e-3)
        parts = [f"{self.stage:<10} {self._fraction()}"]
        if samples := self.counts.get("samples", 0):
            parts.append(f"{samples / seconds:,.1f} samples/s")
        if size := self.counts.get("bytes", 0):
            parts.append(f"{size / seconds / 1e6:,.1f} MB/s")
        parts += [f"{name} {value:,.0f}" for name, value in sorted(self.counts.items()) if _is_plain(name)]
        if failures := _top_failures(self.counts):
            parts.append(f"failed: {failures}")
        parts.append(f"{_clock(seconds)}" if finished else f"ETA {self._eta(seconds)}")
        return " · ".join(parts)

    def _fraction(self) -> str:
        if self.total is None:
            return f"{self.done:,} {self.unit}"
        share = self.done / self.total if self.total else 1.0
        bar = ("█" * round(share * _BAR)).ljust(_BAR, "░") + " " if self._live else ""
        return f"{bar}{self.done:,}/{self.total:,} {self.unit}"

    def _eta(self, seconds: float) -> str:
        made = self.done - self.already
        if self.total is None or made == 0:
            return "–"
        return _clock(seconds / made * (self.total - self.done))


def _is_plain(name: str) -> bool:
    return name != "bytes" and not name.startswith("failed.")


def _top_failures(counts: Mapping[str, float], most: int = 3) -> str:
    failed = {name.removeprefix("failed."): n for name, n in counts.items() if name.startswith("failed.") and n}
    top = sorted(failed.items(), key=lambda item: (-item[1], item[0]))[:most]
    return ", ".join(f"{reason} {n:,.0f}" for reason, n in top)


def _clock(seconds: float) -> str:
    """
    >>> _clock(75), _clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
