"""The machine: cores, memory, disk, open files, ports, and locks that a killed build left."""

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
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("cores", True, str(len(os.sched_getaffinity(0))))
    yield Finding("memory", memory >= 6 * _GIB, size(memory), "8 GiB are what the demo is made for")
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("disk", free >= 5 * _GIB, f"{size(free)} free here", "free some space")
    shared = Path("/dev/shm")
    if shared.is_dir():
        room = shutil.disk_usage(shared).free
        hint = "give the container more (docker run --shm-size=4g); Ray's objects lie there"
        yield Finding("shared memory", room >= _GIB // 4, f"{size(room)} free", hint)


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    enough = soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES
    hint = f"ulimit -n 65536 (at most {most} here), or LimitNOFILE= of the service"
    yield Finding("open files", enough, f"{soft:,} at once, at most {most}", hint)


def ports(metrics_port: int | None = None) -> Iterator[Finding]:
    """Whether processes can listen on loopback; `ray start` uses well-known ports, which others may hold."""
    if metrics_port is not None:
        hint = f"end what listens there (`ss -ltnp 'sport = :{metrics_port}'`), or name another"
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
    """A build of a torch extension that was killed leaves a lock on which every later run waits for ever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    locks = [lock for lock in sorted(root.glob("**/lock")) if _is_stale(lock)] if root.exists() else []
    seen = ", ".join(str(lock) for lock in locks) or "no stale lock"
    yield Finding("torch extensions", not locks, seen, f"rm {' '.join(str(lock) for lock in locks)}")


def _is_stale(lock: Path) -> bool:
    """No compiler runs, or it is older than any build takes."""
    if time.time() - lock.stat().st_mtime > _BUILD_S:
        return True
    running = subprocess.run(["ps", "-eo", "comm="], capture_output=True, text=True, check=False).stdout.split()
    return not {"ninja", "nvcc", "cc1plus", "c++"} & set(running)
