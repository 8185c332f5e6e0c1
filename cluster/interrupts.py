"""Interrupts of a command: a signal raises KeyboardInterrupt inside the command's own code, and nowhere else"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from capstan.pipeline.errors import INTERRUPTS

_AGAIN_S: Final = 0.05


class Interrupts:
    """SIGINT, SIGTERM, SIGHUP and SIGQUIT as KeyboardInterrupts of a command, as often as they come, while it runs.

    Python's own handler raises KeyboardInterrupt wherever the signal finds the interpreter. A second one may find it in
    the handling of the first, or at the end of the process: it would end with a traceback and another exit code, and
    cut short the end of Ray's processes. Here, signals that come after the command has ended, by itself or
    interrupted, are dropped. Signals that were ignored before (Ctrl-C for a background script, SIGHUP under nohup) stay
    ignored.
    """

    def __init__(self) -> None:
        """Take over the signals. Only the main thread can."""
        self.seen = False
        for number in INTERRUPTS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._interrupt)
        sys.unraisablehook = self._unraisable

    def during(self, command: Callable[[], int]) -> int:
        """Return the command's exit code. Raises what it raises, KeyboardInterrupt if it is interrupted."""
        return _inside(command)

    def _interrupt(self, _: int, frame: FrameType | None) -> None:
        self.seen = True
        while frame is not None:
            if frame.f_code is _inside.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    def _unraisable(self, failed: Any) -> None:
        """Interrupt again where Python dropped the exception, as it does in finalizers."""
        if not issubclass(failed.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(failed)
            return
        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()


def _inside(command: Callable[[], int]) -> int:
    return command()
