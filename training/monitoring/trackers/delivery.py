"""Delivery to one tracker in the background, through outages and restarts.

Training only appends records to RUN/TRACKER-pending.jsonl; a thread opens the tracker and sends them in order. While
the tracker cannot be reached they stay in the file, and are sent when it is back: in the same run, or by the next
same command. A record is {step, time, scalars}, {step, time, notes} or {step, time, image, file}.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from capstan.training.run import whole_lines

logger = logging.getLogger(__name__)

_FIRST_WAIT_S: Final = 2.0  # after a failure; doubled up to
_LONGEST_WAIT_S: Final = 60.0
_PATIENCE_S: Final = 60.0  # that the end of a run waits for a tracker that neither fails nor answers


class Tracker(Protocol):
    """A tracker's client. Any of its methods may raise any error during an outage."""

    def scalars(self, step: int, values: Mapping[str, float], time_s: float) -> None:
        """Log numbers, each under its name, measured after `step` steps at Unix time `time_s`."""

    def notes(self, step: int, values: Mapping[str, str], time_s: float) -> None:
        """Keep texts, each under its name; a later one replaces an earlier one."""

    def image(self, step: int, name: str, file: Path, time_s: float) -> None:
        """Log a PNG file."""

    def close(self) -> None: ...


class Delivery:
    """The records of one tracker, and the thread that sends them."""

    def __init__(
        self,
        name: str,
        open_tracker: Callable[[], Tracker],
        file: Path,
        step: int,
        rejects: Callable[[Exception], bool],
    ) -> None:
        """Start to send the pending records of `file` up to `step`; later ones will be logged again.

        `rejects` returns whether an error means that the tracker rejects the record, not that it is unavailable.
        """
        self.name, self.file, self._open, self._rejects = name, file, open_tracker, rejects
        self._records = deque(record for record in _read(self.file) if record["step"] <= step)
        with contextlib.suppress(OSError):  # written again when they are sent
            self._rewrite()
        self._changed, self._lock = threading.Event(), threading.Lock()
        self._closing = self._failed = self._unkept = False
        self._last_answer = time.monotonic()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def add(self, record: dict[str, Any]) -> None:
        """Append a record to those that are sent."""
        with self._lock:
            self._records.append(record)
            try:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:  # sent from memory, unless this process ends before
                if not self._unkept:
                    logger.warning("tracker %s: cannot keep records in %s (%s)", self.name, self.file, error)
                self._unkept = True
        self._changed.set()

    def close(self) -> None:
        """Send what is left, unless the tracker is unavailable, and end the thread. A second call does nothing."""
        if self._closing:
            return
        self._closing, self._last_answer = True, time.monotonic()
        self._changed.set()
        while self._thread.is_alive() and time.monotonic() - self._last_answer < _PATIENCE_S:
            self._thread.join(0.1)
        if self._records:
            logger.warning(
                "tracker %s: %d records were not sent; they are kept in %s and sent by the next run of this command",
                *(self.name, len(self._records), self.file),
            )

    # In the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        tracker, wait_s = None, _FIRST_WAIT_S
        while True:
            try:
                tracker = tracker or self._open()
                self._send_all(tracker)
                if self._closing and not self._records:
                    tracker.close()
                    return
                wait_s = _FIRST_WAIT_S
                self._changed.wait()
                self._changed.clear()
            except Exception as error:  # noqa: BLE001 - clients raise errors of every kind, and none may end a run
                self._warn(error)
                if self._closing:
                    return
                self._wait(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _send_all(self, tracker: Tracker) -> None:
        while self._records:
            record = self._records[0]
            try:
                self._send(tracker, record)
            except Exception as error:
                if not self._rejects(error):
                    raise
                logger.warning(
                    "tracker %s rejects a record of step %d: %s", self.name, record["step"], _first_line(error)
                )
            self._last_answer = time.monotonic()
            with self._lock:
                self._records.popleft()
                if not self._records:
                    self._rewrite()
            if self._failed:
                self._failed = False
                logger.info("tracker %s: available again, sending the records of the outage", self.name)

    def _send(self, tracker: Tracker, record: Mapping[str, Any]) -> None:
        if "scalars" in record:
            tracker.scalars(record["step"], record["scalars"], record["time"])
        elif "notes" in record:
            tracker.notes(record["step"], record["notes"], record["time"])
        elif (file := self.file.parent / record["file"]).is_file():
            tracker.image(record["step"], record["image"], file, record["time"])

    def _warn(self, error: Exception) -> None:
        self._last_answer = time.monotonic()
        if not self._failed:
            self._failed = True
            logger.warning(
                "tracker %s: unavailable (%s); work continues, records are kept in %s and sent when it is back",
                *(self.name, _first_line(error), self.file),
            )

    def _wait(self, seconds: float) -> None:
        """Wait before the next attempt; only the end of the run cuts it short."""
        end = time.monotonic() + seconds
        while not self._closing and time.monotonic() < end:
            self._changed.wait(min(0.2, seconds))
            self._changed.clear()
            time.sleep(0.05)

    def _rewrite(self) -> None:
        """Write the pending records; no file if there are none."""
        if not self._records:
            self.file.unlink(missing_ok=True)
            return
        partial = self.file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in self._records), encoding="utf-8")
        partial.replace(self.file)


def _read(file: Path) -> list[dict[str, Any]]:
    """Return the records of a pending file; a last line cut off by a kill, and damaged ones, are left out."""
    return [record for _, record in whole_lines(file) if _is_sound(record)]


def _is_sound(record: Mapping[str, Any]) -> bool:
    what = isinstance(record.get("scalars") or record.get("notes"), dict) or (
        isinstance(record.get("file"), str) and "image" in record
    )
    return what and isinstance(record.get("time"), int | float)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
