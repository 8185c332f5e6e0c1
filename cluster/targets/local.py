"""Target for this machine: a background process that outlives its terminal

    FOLDER/<id>/log.txt      the command's output
    FOLDER/<id>/ended.json   its exit code; written last, by the small supervisor that started it

With `workers`, the command gets a Ray cluster of several nodes, all on this machine: a rehearsal for a real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from capstan.cluster.local_cluster import Nodes
from capstan.cluster.targets.base import Handle, JobSpec, State, Target, capstan_line, ended
from capstan.cluster.user_dirs import state_folder
from capstan.pipeline.storage import Storage

_LOOK_EVERY_S = 0.2


class Local(Target):
    kind: Literal["local"] = "local"
    workers: Annotated[int, Field(ge=0)] = (
        0  # Ray worker nodes in addition to a head; 0: Ray inside the command's process
    )
    cpus: Annotated[int, Field(ge=1)] = 1  # of each worker node
    elsewhere: ClassVar[bool] = False

    def documents(self, job: JobSpec) -> dict[str, str]:
        nodes = f"# on a head and {self.workers} worker nodes of {self.cpus} CPUs\n" if self.workers else ""
        variables = "".join(f"{name}={shlex.quote(value)} " for name, value in sorted(self.env.items()))
        return {"command": f"{nodes}cd {shlex.quote(str(Path.cwd()))}\n{variables}{capstan_line(job)}\n"}

    def send(self, job: JobSpec) -> Handle:
        folder = state_folder() / "local" / job.id
        folder.mkdir(parents=True)
        work = {"arguments": job.arguments, "workers": self.workers, "cpus": self.cpus}
        (folder / "work.json").write_text(json.dumps(work))
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "capstan.cluster.targets.local", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.env | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        return {"folder": str(folder), "pid": process.pid, "born": _born(process.pid)}

    def state(self, handle: Handle) -> State:
        alive = _alive(handle)  # before looking for the exit code, which is written before the process ends
        file = Path(handle["folder"]) / "ended.json"
        if file.exists():
            return ended(int(json.loads(file.read_text())["exit_code"]))
        if alive:
            return State("running")
        return State(
            "lost", message="its process is gone and left no exit code: it was killed, or the machine was restarted"
        )

    def logs(self, handle: Handle, *, follow: bool) -> Iterator[str]:
        with (Path(handle["folder"]) / "log.txt").open(encoding="utf-8", errors="replace") as file:
            while True:
                final = not follow or self.state(handle).is_final
                while text := file.read(1 << 16):
                    yield text
                if final:
                    return
                time.sleep(_LOOK_EVERY_S)

    def stop(self, handle: Handle) -> None:
        if _alive(handle):
            os.kill(handle["pid"], signal.SIGTERM)


def _born(pid: int) -> str:
    """Return the start time of a process in the kernel's ticks, which tells a reused process id apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _alive(handle: Handle) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(handle["pid"], os.WNOHANG)  # a child of ours that has ended would still be there
    try:
        os.kill(handle["pid"], 0)
    except OSError:
        return False
    return _born(handle["pid"]) == handle["born"]


def supervise(folder: Path) -> int:
    """Run the command of FOLDER/work.json, write and return its exit code. SIGTERM is passed on to the command."""
    work = json.loads((folder / "work.json").read_text())
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        if process is not None:
            process.send_signal(signal.SIGTERM)

    process: subprocess.Popen[bytes] | None = None
    signal.signal(signal.SIGTERM, stop)
    with Nodes(folder / "ray") as nodes:
        env = dict(os.environ)
        if work["workers"]:
            nodes.start_head()
            for _ in range(work["workers"]):
                nodes.start_worker(cpus=work["cpus"])
            env |= nodes.driver_env()
        if not stopped:
            process = subprocess.Popen([sys.executable, "-m", "capstan", *work["arguments"]], env=env)
            if stopped:
                process.send_signal(signal.SIGTERM)
        code = process.wait() if process is not None else 130
    Storage(str(folder)).write("ended.json", json.dumps({"exit_code": code}).encode())
    return code


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1])))
