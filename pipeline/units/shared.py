"""An object that all workers of a run share: workers call its methods by name

It lives in the driver of a run on this machine's processes, which serves it on a socket; on Ray in actors, each
responsible for some of the keys. Methods are called one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import socket
import tempfile
import threading
import time
import zlib
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Final, Protocol

from capstan.pipeline.units.workers import reason_of

_KEYS: Final = 1 << 16


class Shared(Protocol):
    """The shared object as workers see it."""

    def key_of(self, name: str) -> int:
        """Return the key of what has this name: which object is responsible for it."""

    async def call(self, key: int, method: str, *arguments: object) -> Any:
        """Return what the method returns. Raises OSError if the object cannot be reached at the moment."""


def hash_of(name: str) -> int:
    """Return a number below 65,536, the same in every process."""
    return zlib.crc32(name.encode()) % _KEYS


_shared: Shared | None = None  # of the run whose units this worker processes


def shared() -> Shared | None:
    """Return the object that the workers of this run share; None outside a worker, and if the job has none."""
    return _shared


def set_shared(found: Shared | None) -> None:
    """Let `shared` return this from now on."""
    global _shared
    _shared = found


class Served:
    """Serves an object to processes of this machine, until `close`."""

    def __init__(self, target: object) -> None:
        self._target, self._lock, self._closed = target, threading.Lock(), False
        folder = tempfile.mkdtemp(prefix="capstan-")
        # At an exit that an interrupt hastened it comes after the listener's own finalizer, which removes the socket.
        self._remove_folder = Finalize(self, shutil.rmtree, (folder, True), exitpriority=-1)
        self.key = secrets.token_bytes(32)
        self.address = str(Path(folder) / "shared")  # the path of the socket
        self._listener = Listener(self.address, "AF_UNIX", authkey=self.key)
        threading.Thread(target=self._accept, name="capstan-shared", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._closed = True
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as waker:
            waker.connect(self.address)  # closing the listener would not wake the thread that accepts
        self._listener.close()
        self._remove_folder()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError, AuthenticationError):  # a client that went away, or a stranger
                time.sleep(0.1)  # or no file is left to open
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection[Any, Any]) -> None:
        with contextlib.suppress(EOFError, OSError), connection:
            while True:
                method, arguments = connection.recv()
                with self._lock:
                    answer = self._answer(method, arguments)
                connection.send(answer)

    def _answer(self, method: str, arguments: tuple[object, ...]) -> tuple[Any, str]:
        """Return what the method returns, and ""; or None, and why it failed."""
        try:
            return getattr(self._target, method)(*arguments), ""
        except Exception as error:  # noqa: BLE001 - it is raised in the worker that called
            return None, reason_of(error)


class OnSocket:
    """The object that the driver serves."""

    def __init__(self, address: str, key: bytes) -> None:
        self._address, self._key, self._lock = address, key, threading.Lock()
        self._connection: Connection[Any, Any] | None = None

    def key_of(self, name: str) -> int:
        return 0

    async def call(self, key: int, method: str, *arguments: object) -> Any:
        return await asyncio.to_thread(self._call, method, arguments)

    def _call(self, method: str, arguments: tuple[object, ...]) -> Any:
        with self._lock:
            try:
                self._connection = self._connection or Client(self._address, "AF_UNIX", authkey=self._key)
                self._connection.send((method, arguments))
                answer, failure = self._connection.recv()
            except (EOFError, OSError, AuthenticationError) as error:
                self._connection = None
                raise ConnectionError(f"the driver cannot be reached ({type(error).__name__}: {error})") from error
            if failure:
                raise RuntimeError(failure)
            return answer
