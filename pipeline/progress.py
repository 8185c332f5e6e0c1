"""Progress of a stage on stderr: a live display, or plain lines in a log

Counts are plain names and numbers. Three names are special: `samples` sets the rate, `bytes` the throughput, and
`failed.<reason>` the failures and their top reasons. All others are shown as they are.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from capstan.pipeline.text.printable import printable

PLAIN_EVERY_S = 5.0
LIVE_EVERY_S = 0.5
WINDOW_S = 30.0  # rates and ETA are averages over this window
_BAR = 24  # characters


class _Moment(NamedTuple):
    """The state at a time: seconds since the start; samples; bytes; the share of this run's work that is done."""

    at: float
    samples: float
    bytes: float
    share: float


class Progress:
    """The display of a stage while the `with` block runs. The work calls `advance`; `poll` reads counts from elsewhere.

    `total` is in units of work (None: unknown). `already` is the number of units that an earlier run did: they count
    for the bar but not for the rate. `samples` is the number that this run will process (0: unknown): with it, the ETA
    does not have to wait for the first unit.
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        *,
        already: int = 0,
        samples: int = 0,
        poll: Callable[[], Mapping[str, float]] | None = None,
        enabled: bool = True,
        unit: str = "units",
        stream: TextIO | None = None,
    ) -> None:
        self.stage, self.total, self.already, self.samples, self.unit = stage, total, already, samples, unit
        self.done = already
        self.counts: dict[str, float] = {}
        self._poll, self._enabled = poll, enabled
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._logs: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, name=f"progress-{stage}", daemon=True)
        self._start = time.monotonic()
        self._history = deque([_Moment(0.0, 0, 0, 0)])

    def advance(self, units: int = 1, counts: Mapping[str, float] | None = None) -> None:
        """Add `units` to the finished work and `counts` to the counts."""
        self.done += units
        for name, value in (counts or {}).items():
            self.counts[name] = self.counts.get(name, 0) + value

    def __enter__(self) -> Progress:
        if self._enabled:
            if self._console.is_terminal:
                self._live = Live(console=self._console, get_renderable=self._renderable, refresh_per_second=4)
                self._live.start()
                self._take_logs()
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
            for handler, stream in self._logs:
                handler.setStream(stream)
        elif kind is None:
            self._console.print(self.line(finished=True), markup=False)

    def _take_logs(self) -> None:
        """Redirect log lines to above the live display."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._console.file:
                self._logs.append((handler, handler.setStream(sys.stderr)))  # the display has replaced sys.stderr

    def _tick(self) -> None:
        """Refresh the display until the block ends (in its own thread)."""
        while not self._stop.wait(LIVE_EVERY_S if self._live else PLAIN_EVERY_S):
            self._refresh()
            if self._live is None:
                self._console.print(self.line(), markup=False)

    def _refresh(self) -> None:
        if self._poll is not None:
            self.counts.update(self._poll())
        self.note(time.monotonic() - self._start)

    def note(self, now_s: float) -> None:
        """Record the current counts, for the rates; `now_s` is in seconds since the start."""
        samples, size, share = self.counts.get("samples", 0), self.counts.get("bytes", 0), self._share()
        if not samples and not share:
            self._history.clear()  # the time in which workers start is not part of the rate
        self._history.append(_Moment(now_s, samples, size, share))
        while len(self._history) > 2 and self._history[1].at <= now_s - WINDOW_S:
            self._history.popleft()

    def _share(self) -> float:
        """Return the share of this run's work that is done: by samples if their number is known, else by units."""
        shares = [0.0]
        if self.total is not None and self.total > self.already:
            shares.append((self.done - self.already) / (self.total - self.already))
        if self.samples:
            shares.append(self.counts.get("samples", 0) / self.samples)
        return min(1.0, max(shares))

    # Text ------------------------------------------------------------------------------------------------------------

    def line(self, finished: bool = False) -> str:
        """Return the state as one line of text, with the latest rates; at the end, with those of the whole stage."""
        return printable(" · ".join(part for part in (self._work(finished), self._outcome()) if part))

    def _renderable(self) -> Text:
        outcome = printable(self._outcome())
        text = Text(self._work(finished=self._stop.is_set()), no_wrap=True, overflow="ellipsis")
        text.stylize("bold", 0, len(self.stage))
        if outcome:
            text.append("\n" + " " * 11 + outcome, "yellow" if "failed" in outcome else "")
        return text

    def _work(self, finished: bool) -> str:
        """Return the stage, units, rates, and the time left or taken."""
        seconds = max(time.monotonic() - self._start, 1e-3)
        before, now = self._history[0], self._history[-1]
        if finished:
            before, now = _Moment(0, 0, 0, 0), now._replace(at=seconds)
        parts = [f"{self.stage:<10} {self._fraction()}"]
        if now.samples:
            parts.append(f"{_rate(before.samples, now.samples, now.at - before.at):,.1f} samples/s")
        if now.bytes:
            parts.append(f"{_rate(before.bytes, now.bytes, now.at - before.at) / 1e6:,.1f} MB/s")
        parts.append(_clock(seconds) if finished else f"ETA {self.eta()}")
        return " · ".join(parts)

    def _outcome(self) -> str:
        """Return the numbers of good and failed samples, the top failure reasons, and all other counts."""
        failed = {
            name.removeprefix("failed."): n for name, n in self.counts.items() if name.startswith("failed.") and n
        }
        samples, bad = self.counts.get("samples", 0), sum(failed.values())
        parts = [f"ok {max(samples - bad, 0):,.0f}"] if samples else []
        parts += [f"{name} {n:,.0f}" for name, n in sorted(self.counts.items()) if _is_plain(name) and n]
        if bad:
            share = f" ({bad / samples:.1%})" if samples else ""
            parts.append(f"failed {bad:,.0f}{share}: {_top(failed)}")
        return " · ".join(parts)

    def _fraction(self) -> str:
        if self.total is None:
            return f"{self.done:,} {self.unit}"
        share = self.done / self.total if self.total else 1.0
        if self.samples:
            share = (self.already + self._share() * (self.total - self.already)) / self.total
        bar = ("█" * int(share * _BAR)).ljust(_BAR, "░") + " " if self._live else ""
        return f"{bar}{self.done:,}/{self.total:,} {self.unit}"

    def eta(self) -> str:
        """Return the time left at the latest rate as h:mm:ss, or "–" while nothing is done."""
        now = self._history[-1]
        # Units finish in steps, and a window may contain none: without samples, the rate is that of the whole run.
        before = self._history[0] if self.samples else _Moment(0, 0, 0, 0)
        pace = _rate(before.share, now.share, now.at - before.at)
        if self.total is None or pace <= 0:
            return "–"
        return _clock((1 - now.share) / pace)


def _rate(before: float, now: float, seconds: float) -> float:
    return (now - before) / max(seconds, 1e-3)


def _is_plain(name: str) -> bool:
    return name not in ("samples", "bytes") and not name.startswith("failed.")


def _top(failed: Mapping[str, float], most: int = 3) -> str:
    top = sorted(failed.items(), key=lambda item: (-item[1], item[0]))
    more = f", {len(top) - most} more" if len(top) > most else ""
    return ", ".join(f"{reason} {n:,.0f}" for reason, n in top[:most]) + more


def _clock(seconds: float) -> str:
    """
    >>> _clock(75), _clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
