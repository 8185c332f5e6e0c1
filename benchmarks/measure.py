"""A command → the wall-clock seconds, CPU seconds and memory of all processes that it starts.

Ray's workers do not stay children of the driver, so waiting for children does not count their CPU time. Every process
that a command starts inherits one environment variable. By this mark they are found in /proc, several times per second,
until the last one has ended.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_MARK = "CAPSTAN_BENCH_RUN"
_TICK = os.sysconf("SC_CLK_TCK")
_EVERY_S = 0.1
_MEMORY_EVERY_S = 1.0  # reading a process's share of memory costs milliseconds


@dataclass(frozen=True)
class Run:
    """The cost of a command.

    `memory` is the peak of the sum of all its processes' proportional set sizes, in bytes, `own` that without files.
    """

    wall_s: float
    cpu_s: float
    memory: int
    own: int
    output: str


def measure(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    cwd: Path | None = None,
    memory: bool = True,
) -> Run:
    """Run `command` to its end. Raises CalledProcessError with its output if it fails."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, **(environment or {}), _MARK: mark}
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watch = _Watch(mark, memory)
    watch.start()
    output, _ = process.communicate()
    wall = time.monotonic() - start
    watch.finish()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), output)
    return Run(wall, watch.cpu_s, watch.peak, watch.own, output)


class _Watch(threading.Thread):
    """A thread that watches all processes with the mark, until none is left after `finish`."""

    def __init__(self, mark: str, memory: bool) -> None:
        super().__init__(name="measure", daemon=True)
        self._mark, self._memory = f"{_MARK}={mark}".encode(), memory
        self._cpu: dict[tuple[int, int], float] = {}  # (pid, start time) → CPU seconds when last seen
        self._other: set[tuple[int, int]] = set()
        self._ending = False
        self.peak = self.own = 0

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu.values())

    def finish(self) -> None:
        self._ending = True
        self.join(timeout=30)

    def run(self) -> None:
        looked = 0.0
        while True:
            alive = self._look()
            if self._memory and time.monotonic() - looked >= _MEMORY_EVERY_S:
                looked = time.monotonic()
                shares = [_shares(pid) for pid in alive]
                self.peak = max(self.peak, sum(all_ for all_, _ in shares))
                self.own = max(self.own, sum(own for _, own in shares))
            if self._ending and not alive:
                return
            time.sleep(_EVERY_S)

    def _look(self) -> list[int]:
        """Record the CPU time of every marked process; return their pids."""
        alive = []
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            try:
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                known = (int(entry.name), int(fields[19]))
                if known in self._other:
                    continue
                if known not in self._cpu and self._mark not in Path(entry.path, "environ").read_bytes():
                    # A process between fork and exec shows its parent's environment: look again while it is young.
                    if time.clock_gettime(time.CLOCK_BOOTTIME) - known[1] / _TICK > 2:
                        self._other.add(known)
                    continue
            except (OSError, IndexError):
                continue  # it has just ended, or belongs to the kernel
            self._cpu[known] = (int(fields[11]) + int(fields[12])) / _TICK
            if fields[0] != "Z":
                alive.append(known[0])
        return alive


def _shares(pid: int) -> tuple[int, int]:
    """Return a process's proportional set size in bytes, and its part without files; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss")}
    return sizes.get("Pss:", 0), sizes.get("Pss_Anon:", 0)
