"""Start `capstan` commands as processes that can be killed, waited for and asked how they ended.

A process is forked from one that has imported what commands import, so that a test which kills a command ten times
pays for ten pieces of work, not for ten starts of Python.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 500  # against hangs
_WARM = (  # imported once, in the process that the others are forked from
    *("capstan.cluster.cli", "capstan.cluster.recipe", "capstan.pipeline.build", "pyarrow.dataset", "s3fs"),
    *("capstan.recaption.job", "capstan.recaption.export", "capstan.recaption.import_captions"),
)
_MODELS = (
    *("torch", "capstan.training.launch", "capstan.training.encode", "capstan.training.export"),
    *("capstan.training.models.autoencoder", "capstan.training.models.diffusion"),
    *("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "capstan.training.precomputed.latents"),
)


def warm(*, models: bool) -> None:
    """Say what is imported before any process is forked; with `models`, torch and diffusers too."""
    names = [*_WARM, *(_MODELS if models else ())]
    multiprocessing.get_context("forkserver").set_forkserver_preload(names)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and its lines on stderr."""

    code: int
    lines: list[str]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.lines if line.startswith("error: ")]

    def is_clear(self) -> bool:
        """Whether it succeeded, or failed with a documented exit code and one line that says why."""
        if any(line.startswith("Traceback") for line in self.lines):
            return False
        return self.code == 0 or (self.code in (1, 2, 3) and len(self.errors) == 1)

    def __str__(self) -> str:
        return f"exit {self.code}" + "".join(f": {error.removeprefix('error: ')}" for error in self.errors)


class Life:
    """One process of a command, in a session of its own; its stderr goes to the file `log`."""

    def __init__(self, arguments: list[str], env: Mapping[str, str], log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._popen: subprocess.Popen[bytes] | None = None
        if arguments[:2] != ["-m", "capstan"]:
            with log.open("wb") as file:
                self._popen = subprocess.Popen(
                    [sys.executable, *arguments],
                    **{"stdout": subprocess.DEVNULL, "stderr": file, "env": dict(env), "start_new_session": True},
                )
            self.pid = self._popen.pid
        else:
            context = multiprocessing.get_context("forkserver")
            self._process = context.Process(target=_live, args=(arguments[2:], dict(env), str(log)))
            self._process.start()
            assert self._process.pid is not None
            self.pid = self._process.pid

    def code(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._popen.poll() if self._popen else self._process.exitcode

    def wait(self, seconds: float = LIMIT_S) -> bool:
        """Wait for the end, at most so long; return whether it came."""
        end = time.monotonic() + seconds
        while self.code() is None and time.monotonic() < end:
            time.sleep(0.005)
        return self.code() is not None

    def kill(self) -> None:
        """Send SIGKILL to it and to its session."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # too early: it has no session yet
            os.kill(self.pid, signal.SIGKILL)
        assert self.wait()

    def end(self) -> Ended:
        if not self.wait():
            self.kill()
            raise AssertionError("the command hangs: " + self._log.read_text(errors="replace"))
        return Ended(self.code() or 0, self._log.read_text(errors="replace").splitlines())


def _live(arguments: list[str], env: dict[str, str], log: str) -> None:
    """Do in this process what `python -m capstan` does in one of its own."""
    os.setsid()
    for number, target in ((0, os.devnull), (1, os.devnull), (2, log)):
        file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(env)
    from capstan.cluster.cli import run

    try:
        code = run(arguments)
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)
