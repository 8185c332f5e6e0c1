"""Decoding that survives what it decodes: a deadline per row, and a process of its own for units that failed before

At the first attempt of a unit, images are decoded in the worker, and a decode that takes too long ends the worker. At
later attempts they are decoded in a child process: if it ends or takes too long, only the row fails. So a file that
crashes or hangs a codec costs its unit one attempt, wherever the unit runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import cloudpickle  # by value what the child cannot import

from capstan.pipeline.errors import FROM_TERMINAL
from capstan.pipeline.image.decode import Failure
from capstan.pipeline.units import child
from capstan.pipeline.units.child import start_child

Decoder = Callable[[bytes], Any]  # to a StoredImage or what clips are, or a Failure

DECODE_S: Final = 120.0  # of one image; the largest allowed ones take seconds
_START_S: Final = 300.0  # a child imports the codecs, maybe from a slow disk
_TRIES: Final = 2  # a child that ends may have been killed for another process's memory


@contextlib.contextmanager
def guarded(decoder: Decoder, *, is_retry: bool, seconds: float = DECODE_S) -> Iterator[Decoder]:
    """Yield `decoder` with a deadline of `seconds` per image; with `is_retry`, in a child process."""
    if is_retry:
        child = _Child(decoder, seconds)
        try:
            yield child
        finally:
            child.close()
        return
    with Path(os.devnull).open("w") as nowhere:

        def in_time(data: bytes) -> Any:
            # Its timer is a thread of C: it also ends a codec that never releases the interpreter.
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            try:
                return decoder(data)
            finally:
                faulthandler.cancel_dump_traceback_later()

        yield in_time


class _Child:
    """A child process that decodes; started when needed, and again after it ended."""

    def __init__(self, decoder: Decoder, seconds: float) -> None:
        self._pickled, self._seconds = cloudpickle.dumps(decoder), seconds
        self.process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any]

    def __call__(self, data: bytes) -> Any:
        ended = ""
        for _ in range(_TRIES):
            self._start()
            try:
                self._connection.send_bytes(data)
                if not self._connection.poll(self._seconds):
                    self.close()
                    return Failure("corrupt", f"decoding took more than {self._seconds:g} s")
                result = pickle.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                ended = self._ending()
                continue
            if isinstance(result, BaseException):
                raise result
            return result
        return Failure("corrupt", f"decoding it ended the process {_TRIES} times ({ended})")

    def close(self) -> None:
        """End the child."""
        if self.process is not None:
            self._connection.close()
            self.process.kill()
            self.process.wait()
            self.process = None

    def _start(self) -> None:
        if self.process is not None:
            return
        self.process, self._connection = start_child("capstan.pipeline.ingest.guarded")
        try:
            self._connection.send_bytes(self._pickled)
            if not self._connection.poll(_START_S):
                raise EOFError
            self._connection.recv_bytes()
        except (EOFError, OSError):  # no image has been sent yet: the unit's failure, not a row's
            raise RuntimeError(f"the process that decodes did not start ({self._ending()})") from None

    def _ending(self) -> str:
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)  # its end of the connection is closed; its status may come later
        code = self.process.poll()
        self.close()
        with contextlib.suppress(ValueError):
            return signal.Signals(-(code or 0)).name
        return f"exit code {code}"


def main() -> None:
    """Decode what comes through the pipe, until it is closed."""
    for number in FROM_TERMINAL:  # a terminal sends them to all; the parent decides
        signal.signal(number, signal.SIG_IGN)
    connection = child.connection()
    with contextlib.suppress(EOFError, OSError):  # the parent has closed its end, or is gone
        decoder: Decoder = pickle.loads(connection.recv_bytes())
        connection.send_bytes(b"ready")
        while True:
            connection.send_bytes(pickle.dumps(_result(decoder, connection.recv_bytes())))


def _result(decoder: Decoder, data: bytes) -> Any:
    try:
        return decoder(data)
    except Exception as error:  # noqa: BLE001 - raised again in the parent
        return error
