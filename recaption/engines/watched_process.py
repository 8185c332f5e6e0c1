"""A command in its own process group, ended when whoever started it dies

    python watched_process.py COMMAND ...

Run as a script: it starts the command and reads its standard input. That ends when the parent process does, however
that happens; the whole group is then ended. Imports nothing but the standard library, so it starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

_GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main(command: list[str]) -> int:
    """Run the command until it ends, or until standard input does; return its exit code."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_me)

    def end_with_parent() -> None:
        while os.read(0, 1 << 10):
            pass
        _end(process)

    signal.signal(signal.SIGTERM, lambda *_: _end(process))
    threading.Thread(target=end_with_parent, daemon=True).start()
    code = process.wait()
    _signal(process.pid, signal.SIGKILL)  # whatever is left of the group
    return code


def _end_with_me() -> None:
    """Have this process killed when its parent ends, also if that is killed: Ray kills what its workers started."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    _signal(process.pid, signal.SIGTERM)
    timer = threading.Timer(_GRACE_S, _signal, (process.pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # at once, although a thread still reads
