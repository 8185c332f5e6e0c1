"""A path that may be opened: no named pipe and no device, on which a reader could wait for ever"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

_HANDED_OVER: Final = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # pipes of the shell: `<(command)`


class NotRegular(OSError):
    """The path is of a named pipe, a socket or a device."""


def regular(path: str | os.PathLike[str], *, or_pipe: bool = False) -> str:
    """Return `path` if opening it does not wait; `or_pipe` allows a pipe that the shell made, which has a writer.

    Raises NotRegular, or another OSError if there is nothing.
    """
    name = os.fspath(path)
    mode = os.stat(name).st_mode  # noqa: PTH116 - called for every file that is read
    is_pipe = or_pipe and stat.S_ISFIFO(mode) and name.startswith(_HANDED_OVER)
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or is_pipe:  # a folder fails by itself when it is read
        return name
    raise NotRegular(errno.EINVAL, "it is a named pipe or a device, not a file", name)
