"""Ctrl-C and SIGTERM while a run trains: the first asks it to save and stop, asking again ends it at once."""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import Any, Final

logger = logging.getLogger("capstan.training.signals")

_ECHO_S: Final = 5.0  # within which another SIGTERM is the same request once more


class Interrupts:
    """`seen` is set by the first signal while the `with` block runs; asked again, KeyboardInterrupt is raised there.

    Asked again means a second Ctrl-C, or any signal some seconds after the first. A SIGTERM at once after another says
    nothing new: a scheduler signals every process of a job, and torchrun and accelerate hand on what they were sent to
    workers that have had it already. What was ignored before (Ctrl-C, in a script's background) stays ignored, and
    outside the main thread nothing is heard, for signals go elsewhere.
    """

    def __init__(self, words: str) -> None:
        """`words` are logged at the first signal."""
        self.seen, self.words = False, words
        self._since, self._pressed = 0.0, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        self._pressed += number == signal.SIGINT
        if not self.seen:
            self.seen, self._since = True, now
            logger.info("%s", self.words)
        elif self._pressed > 1 or now - self._since > _ECHO_S:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
