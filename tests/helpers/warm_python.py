"""Python processes that do not import torch, diffusers and transformers again: forks of one that has imported them.

    Popen([sys.executable, …]), run(…), PIPE    as of `subprocess`, with the options that tests use

A start costs a tenth of the CPU seconds of a new interpreter. All else is as ever: a process of its own with its own
environment, folder, arguments, import path and exit code, which can be killed. The parent of all forks has imported
neither Capstan nor anything of the tests, has one thread, and ends with the process of the tests.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.nn.parallel",
    "torch.utils.data",
    "torch.utils.flop_counter",
    "torch.utils.tensorboard",
    "accelerate",
    "diffusers",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.pipelines.pipeline_utils",
    "diffusers.pipelines.stable_diffusion",
    "transformers",
    "transformers.models.auto",
    "transformers.models.clip.modeling_clip",
    "transformers.modeling_utils",
    "numpy",
    "PIL.Image",
    "safetensors.torch",
    "pydantic",
    "tokenizers",
    "yaml",
    "pyarrow.parquet",
    "pandas",
]
_lock = threading.Lock()
_parent: socket.socket | None = None


class Popen:
    """A process, forked from the parent of all. `stdin`, `stdout` and `stderr` are as in `subprocess.Popen`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        start_new_session: bool = False,
    ) -> None:
        assert command[0] == sys.executable
        self.returncode: int | None = None
        self.stdin: IO[bytes] | None = None
        self._status, status = os.pipe()
        with contextlib.ExitStack() as opened:
            theirs = []
            for number, wanted in enumerate((stdin, stdout, stderr)):
                if wanted is None:
                    theirs.append(number)
                elif wanted == DEVNULL:
                    theirs.append(os.open(os.devnull, os.O_RDWR))
                    opened.callback(os.close, theirs[-1])
                elif wanted == PIPE:
                    assert number == 0, "give a file for what is written"
                    read, write = os.pipe()
                    opened.callback(os.close, read)
                    theirs.append(read)
                    self.stdin = os.fdopen(write, "wb", buffering=0)
                else:
                    theirs.append(wanted.fileno())
            environment = dict(os.environ if env is None else env)
            asked = {"arguments": [str(part) for part in command[1:]], "environment": environment}
            asked |= {"folder": str(cwd or Path.cwd()), "session": start_new_session}
            self.pid = _ask(asked, [*theirs, status])
        os.close(status)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("python", timeout or 0)
            said = os.read(self._status, 100)
            os.close(self._status)
            assert said, "the parent of warm processes has died"
            self.returncode = int(said)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[str],
    *,
    check: bool = False,
    capture_output: bool = False,
    text: bool = False,
    timeout: float | None = None,
    stdout: int | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run`; what is written is always returned, and shown unless it is asked for."""
    shown = not capture_output and stdout != PIPE
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Popen(command, stdout=out, stderr=err, **options)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        said: list[Any] = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode() if text else file.read())
    if shown or (check and code):
        sys.stderr.write(said[1] if text else said[1].decode())
    if check and code:
        raise subprocess.CalledProcessError(code, list(command), *said)
    return subprocess.CompletedProcess(list(command), code, *said)


def run_together(command: Sequence[str], environments: Sequence[Mapping[str, str]], timeout: float) -> list[str]:
    """Run as many processes at once as there are environments; return what each wrote to stderr. None may fail."""
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(tempfile.TemporaryFile("w+")) for _ in environments]
        processes = [Popen(command, env=env, stderr=file) for env, file in zip(environments, files, strict=True)]
        for process in processes:
            opened.callback(process.kill)
        end = time.monotonic() + timeout
        codes = [process.wait(max(0.0, end - time.monotonic())) for process in processes]
        for file in files:
            file.seek(0)
        logs = [file.read() for file in files]
    assert not any(codes), "\n".join(logs)[-4000:]
    return logs


def _ask(asked: dict[str, Any], files: list[int]) -> int:
    """Have a process forked with these files as 0, 1, 2 and the one for its exit code; return its id."""
    global _parent
    with _lock:
        if _parent is None:
            _parent, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            home = tempfile.TemporaryDirectory()
            quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": home.name}
            quiet["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | quiet
            with theirs:
                command = [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno())]
                process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
            atexit.register(_end, _parent, process, home)
        data = json.dumps(asked).encode()
        socket.send_fds(_parent, [len(data).to_bytes(4, "big")], files)
        _parent.sendall(data)
        return int.from_bytes(_read(_parent, 4), "big")


def _end(parent: socket.socket, process: subprocess.Popen[bytes], home: tempfile.TemporaryDirectory[str]) -> None:
    parent.close()
    process.kill()
    process.wait()
    home.cleanup()


def _read(connection: socket.socket, count: int) -> bytes:
    data = connection.recv(count, socket.MSG_WAITALL)
    if len(data) < count:
        raise EOFError
    return data


# The parent of all, and its children ---------------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Fork a process per request, and report how each ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").glob("*"))) <= 1, "a process with threads cannot be forked safely"
    reports: dict[int, int] = {}  # process → where its exit code is written
    while True:
        if not select.select([connection], [], [], 0.02 if reports else None)[0]:
            _report(reports)
            continue
        head, files, _, _ = socket.recv_fds(connection, 4, 4)
        if not head:
            return
        asked = json.loads(_read(connection, int.from_bytes(head, "big")))
        if not (pid := os.fork()):
            connection.close()
            for report in reports.values():
                os.close(report)
            _become(asked, files)
        for file in files[:3]:
            os.close(file)
        reports[pid] = files[3]
        connection.sendall(pid.to_bytes(4, "big"))


def _report(reports: dict[int, int]) -> None:
    while reports:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        report = reports.pop(pid)
        with contextlib.suppress(BrokenPipeError):
            os.write(report, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(report)


def _become(asked: dict[str, Any], files: list[int]) -> None:
    """Be the process that was asked for; never returns."""
    code = 1
    try:
        if asked["session"]:
            os.setsid()
        for number, file in enumerate(files[:3]):
            os.dup2(file, number)
        for file in files:
            os.close(file)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        random.seed()
        sys.modules["numpy"].random.seed()
        kind, what, *arguments = asked["arguments"]
        if kind not in ("-m", "-c"):
            kind, what, arguments = "file", kind, asked["arguments"][1:]
        path = [entry for entry in asked["environment"].get("PYTHONPATH", "").split(os.pathsep) if entry]
        first = {"-m": asked["folder"], "-c": "", "file": str(Path(what).parent)}[kind]
        sys.path[:1] = [first, *path]  # in place of this file's folder
        importlib.invalidate_caches()
        sys.argv = [what if kind == "file" else kind, *arguments]
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif kind == "file":
            runpy.run_path(what, run_name="__main__")
        else:
            del sys.modules["__main__"].__file__
            exec(compile(what, "<string>", "exec"), sys.modules["__main__"].__dict__)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - a traceback and 1, as of any program
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
