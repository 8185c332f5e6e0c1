"""Checks of the machine: cores, memory, disk, open files, ports, stale build locks"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from capstan.cluster.doctor.finding import Finding, size

_GIB: Final = 2**30
_OPEN_FILES: Final = 4096
_BUILD_S: Final = 1800.0  # no extension takes longer to build
_RAY_PORTS: Final = {6379: "Ray's head", 8265: "its dashboard"}


def cores_memory_disk() -> Iterator[Finding]:
    """Check the machine's size."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("cores", True, str(len(os.sched_getaffinity(0))))
    yield Finding("memory", memory >= 6 * _GIB, size(memory), "use a machine with at least 8 GiB")
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("disk", free >= 5 * _GIB, f"{size(free)} free here", "free at least 5 GiB")
    shared = Path("/dev/shm")
    if shared.is_dir():
        room = shutil.disk_usage(shared).free
        hint = "enlarge it (docker run --shm-size=4g); Ray keeps its objects there"
        yield Finding("shared memory", room >= _GIB // 4, f"{size(room)} free", hint)


def open_files() -> Iterator[Finding]:
    """Check how many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    enough = soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES
    hint = f"run `ulimit -n 65536` (at most {most} here), or set LimitNOFILE= of the service"
    yield Finding("open files", enough, f"limit {soft:,}, at most {most}", hint)


def ports(metrics_port: int | None = None) -> Iterator[Finding]:
    """Check the port of the recipe's metrics; report whether the well-known ports of `ray start` are free."""
    if metrics_port is not None:
        hint = f"stop the process that listens there (`ss -ltnp 'sport = :{metrics_port}'`), or set another port"
        free = _is_free(metrics_port)
        yield Finding("resources.metrics_port", free, f"{metrics_port} is {'free' if free else 'taken'}", hint)
    taken = [f"{port} ({what})" for port, what in _RAY_PORTS.items() if not _is_free(port)]
    seen = f"taken: {', '.join(taken)}" if taken else f"{', '.join(map(str, _RAY_PORTS))} are free"
    yield Finding("ports", True, seen)  # Capstan's own Ray takes free ones


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def extension_locks() -> Iterator[Finding]:
    """Look for the lock of a killed build of a torch extension, on which every later run waits forever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    locks = [lock for lock in sorted(root.glob("**/lock")) if _is_stale(lock)] if root.exists() else []
    seen = ", ".join(str(lock) for lock in locks) or "no stale lock"
    yield Finding("torch extensions", not locks, seen, f"rm {' '.join(str(lock) for lock in locks)}")


def _is_stale(lock: Path) -> bool:
    """Return whether no compiler is running, or the lock is older than any build takes."""
    if time.time() - lock.stat().st_mtime > _BUILD_S:
        return True
    running = subprocess.run(["ps", "-eo", "comm="], capture_output=True, text=True, check=False).stdout.split()
    return not {"ninja", "nvcc", "cc1plus", "c++"} & set(running)
