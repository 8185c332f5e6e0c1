"""A Python process of our own at the other end of a pipe

It has the import path of this one, and is a session of its own, so that an interrupt is for its parent alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from typing import Any, Final

_CODE: Final = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[3])
importlib.import_module(sys.argv[2]).main()
"""


def start_child(
    module: str, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Connection[Any, Any]]:
    """Start `main` of `module`, which finds its `connection`; return the process and this end of the pipe.

    Its stdout, which is for the summary, and its stderr are dropped: what matters comes through the pipe.
    """
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(theirs.fileno()), module, json.dumps(sys.path)],
            pass_fds=[theirs.fileno()],
            env=os.environ | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return process, ours


def connection() -> Connection[Any, Any]:
    """Return the child's end of the pipe."""
    return Connection(int(sys.argv[1]))
