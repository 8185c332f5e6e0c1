"""Ctrl-C, Ctrl-\\, SIGTERM and SIGHUP during training: save and stop, or stop at once"""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import Any, Final

from capstan.pipeline.errors import INTERRUPTS

logger = logging.getLogger("capstan.training.signals")

_ECHO_S: Final = 5.0  # another SIGTERM within this time counts as the same request


class Interrupts:
    """Signal handling for a `with` block: the first signal sets `seen`, a second request raises KeyboardInterrupt.

    A second request is a second Ctrl-C or Ctrl-\\, or any signal more than 5 seconds after the first. A SIGTERM right
    after another one is the same request: schedulers signal every process of a job, and torchrun and accelerate
    forward signals to workers that have received them already. Signals that were ignored before (Ctrl-C for a
    background script) stay ignored. Outside the main thread no handler is installed.
    """

    def __init__(self, message: str) -> None:
        """Log `message` at the first signal."""
        self.seen, self.message = False, message
        self._since, self._pressed = 0.0, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in INTERRUPTS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        self._pressed += number in (signal.SIGINT, signal.SIGQUIT)
        if not self.seen:
            self.seen, self._since = True, now
            logger.info("%s", self.message)
        elif self._pressed > 1 or now - self._since > _ECHO_S:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
